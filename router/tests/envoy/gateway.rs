//! A real Envoy between a client and a picker, all on ports of their own.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use hyper::body::Incoming;
use hyper::{Method, Response};
use kvrouter::config::epp::EppConfig;
use kvrouter::{Config, Router};
use serde_json::{Value as Json, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::fakes::{FakeWorker, Running, soon, whole};

/// How Envoy is set up. The default is what `router/deploy/envoy` shows.
#[derive(Clone, Debug)]
pub struct Setup {
    pub request_mode: &'static str,
    pub response_mode: &'static str,
    pub eager: bool,
    pub failure_mode_allow: bool,
    /// Metadata of a filter before the picker: the subset hint.
    pub subset: Option<Json>,
    /// The endpoints of a cluster with a list of fallbacks, instead of one that goes wherever the picker says.
    pub endpoints: Vec<String>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            request_mode: "FULL_DUPLEX_STREAMED",
            response_mode: "FULL_DUPLEX_STREAMED",
            eager: false,
            failure_mode_allow: false,
            subset: None,
            endpoints: Vec::new(),
        }
    }
}

fn typed(name: &str, kind: &str, mut config: Json) -> Json {
    config["@type"] = format!("type.googleapis.com/{kind}").into();
    json!({"name": name, "typed_config": config})
}

fn address(text: &str) -> Json {
    let (host, port) = text.rsplit_once(':').unwrap();
    json!({"socket_address": {"address": host, "port_value": port.parse::<u16>().unwrap()}})
}

fn endpoints(list: &[String]) -> Json {
    let endpoints: Vec<_> = list
        .iter()
        .map(|one| json!({"endpoint": {"address": address(one)}}))
        .collect();
    json!([{"lb_endpoints": endpoints}])
}

impl Setup {
    fn picker_filter(&self) -> Json {
        let mut modes = json!({
            "request_header_mode": "SEND",
            "response_header_mode": "SEND",
            "request_body_mode": self.request_mode,
            "response_body_mode": self.response_mode,
        });
        for (mode, trailers) in [
            (self.request_mode, "request_trailer_mode"),
            (self.response_mode, "response_trailer_mode"),
        ] {
            if mode == "FULL_DUPLEX_STREAMED" {
                modes[trailers] = "SEND".into();
            }
        }
        let mut config = json!({
            "grpc_service": {"envoy_grpc": {"cluster_name": "picker"}, "timeout": "0s"},
            "processing_mode": modes,
            "failure_mode_allow": self.failure_mode_allow,
            "response_attributes": ["response.code_details"],
            "metadata_options": {
                "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint", "envoy.lb"]},
                "receiving_namespaces": {"untyped": ["envoy.lb"]},
            },
        });
        if self.request_mode != "FULL_DUPLEX_STREAMED" {
            config["message_timeout"] = "20s".into();
        }
        if self.eager {
            config["send_body_without_waiting_for_header_response"] = true.into();
        }
        typed(
            "envoy.filters.http.ext_proc",
            "envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
            config,
        )
    }

    fn filters(&self) -> Vec<Json> {
        let mut filters = Vec::new();
        if let Some(hint) = &self.subset {
            let hint = json!({"x-gateway-destination-endpoint-subset": hint});
            let namespace = "envoy.lb.subset_hint";
            filters.push(typed(
                "envoy.filters.http.set_metadata",
                "envoy.extensions.filters.http.set_metadata.v3.Config",
                json!({"metadata": [{"metadata_namespace": namespace, "value": hint}]}),
            ));
        }
        filters.push(self.picker_filter());
        filters.push(typed(
            "envoy.filters.http.router",
            "envoy.extensions.filters.http.router.v3.Router",
            json!({}),
        ));
        filters
    }

    fn workers(&self) -> Json {
        let header = "x-gateway-destination-endpoint";
        if self.endpoints.is_empty() {
            return json!({
                "name": "workers",
                "type": "ORIGINAL_DST",
                "lb_policy": "CLUSTER_PROVIDED",
                "connect_timeout": "2s",
                "original_dst_lb_config": {"use_http_header": true, "http_header_name": header},
            });
        }
        let key = |name: &str| json!({"key": "envoy.lb", "path": [{"key": name}]});
        let round_robin = typed(
            "envoy.load_balancing_policies.round_robin",
            "envoy.extensions.load_balancing_policies.round_robin.v3.RoundRobin",
            json!({}),
        );
        let policy = typed(
            "envoy.load_balancing_policies.override_host",
            "envoy.extensions.load_balancing_policies.override_host.v3.OverrideHost",
            json!({
                "override_host_sources": [{"metadata": key(header)}, {"header": header}],
                "selected_host_key": key("x-gateway-destination-endpoint-served"),
                "fallback_policy": {"policies": [{"typed_extension_config": round_robin}]},
            }),
        );
        json!({
            "name": "workers",
            "type": "STATIC",
            "connect_timeout": "2s",
            "load_assignment": {"cluster_name": "workers", "endpoints": endpoints(&self.endpoints)},
            "load_balancing_policy": {"policies": [{"typed_extension_config": policy}]},
        })
    }

    fn config(&self, picker: &str) -> Json {
        let any = json!({"address": "127.0.0.1", "port_value": 0});
        let mut route =
            json!({"match": {"prefix": "/"}, "route": {"cluster": "workers", "timeout": "0s"}});
        if !self.endpoints.is_empty() {
            let retry = json!({"retry_on": "connect-failure", "num_retries": 2});
            route["route"]["retry_policy"] = retry;
        }
        let manager = typed(
            "envoy.filters.network.http_connection_manager",
            "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
            json!({
                "stat_prefix": "test",
                "http_protocol_options": {"enable_trailers": true},
                "stream_idle_timeout": "0s",
                "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
                "http_filters": self.filters(),
            }),
        );
        let http2 = json!({
            "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
                "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
                "explicit_http_config": {"http2_protocol_options": {}},
            },
        });
        json!({
            "admin": {"address": {"socket_address": any}},
            "static_resources": {
                "listeners": [{
                    "name": "front",
                    "address": {"socket_address": any},
                    "per_connection_buffer_limit_bytes": 32 << 20,
                    "filter_chains": [{"filters": [manager]}],
                }],
                "clusters": [self.workers(), {
                    "name": "picker",
                    "type": "STATIC",
                    "connect_timeout": "2s",
                    "typed_extension_protocol_options": http2,
                    "load_assignment": {"cluster_name": "picker", "endpoints": endpoints(&[picker.to_owned()])},
                }],
            },
        })
    }
}

/// A running Envoy. It ends when this is dropped.
pub struct Envoy {
    pub url: String,
    _child: Child,
    _home: Home,
}

struct Home(PathBuf);

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

impl Envoy {
    pub async fn start(setup: &Setup, picker: &str) -> Self {
        let binary = std::env::var_os("KVROUTER_ENVOY")
            .expect("KVROUTER_ENVOY must name Envoy's binary: use router/tests/envoy/run.sh");
        let home =
            std::env::temp_dir().join(format!("kvrouter-envoy-{:032x}", rand::random::<u128>()));
        std::fs::create_dir(&home).unwrap();
        let home = Home(home);
        let (config, told) = (home.0.join("envoy.json"), home.0.join("admin"));
        std::fs::write(&config, setup.config(picker).to_string()).unwrap();
        let log = std::env::var("KVROUTER_ENVOY_LOG");
        let child = Command::new(binary)
            .arg("-c")
            .arg(&config)
            .arg("--admin-address-path")
            .arg(&told)
            .args(["--concurrency", "1", "--disable-hot-restart"])
            .args(["-l", log.as_deref().unwrap_or("error")])
            .stdout(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let admin = soon(async {
            loop {
                if let Ok(address) = std::fs::read_to_string(&told)
                    && !address.is_empty()
                {
                    return Running::elsewhere(&format!("http://{address}"));
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        let url = soon(async {
            loop {
                let (_, listeners) = admin.read("/listeners?format=json").await;
                let listeners: Json = serde_json::from_str(&listeners).unwrap_or_default();
                let at = "/listener_statuses/0/local_address/socket_address/port_value";
                if let Some(port) = listeners.pointer(at).and_then(Json::as_u64) {
                    return format!("http://127.0.0.1:{port}");
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await;
        Self {
            url,
            _child: child,
            _home: home,
        }
    }
}

/// A picker in this process.
pub struct Picker {
    pub address: String,
    /// The router's own front.
    pub front: Running,
    stop: Option<oneshot::Sender<()>>,
    served: JoinHandle<()>,
}

impl Picker {
    pub async fn start(config: Config) -> Self {
        Self::serve(Router::bind(config).await.unwrap())
    }

    /// A picker that was bound.
    pub fn serve(router: Router) -> Self {
        let address = router.grpc_addr().unwrap().to_string();
        let front = Running::elsewhere(&format!("http://{}", router.local_addr()));
        let (stop, stopped) = oneshot::channel::<()>();
        let served = tokio::spawn(router.serve(async {
            let _ = stopped.await;
        }));
        Self {
            address,
            front,
            stop: Some(stop),
            served,
        }
    }

    /// Begins the drain.
    pub fn stop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
    }

    pub async fn ended(self) {
        soon(self.served).await.unwrap();
    }
}

/// A picker that is a process of its own, and can be killed like one.
pub struct Binary {
    pub child: Child,
    pub address: String,
    pub front: Running,
}

impl Binary {
    /// Starts it on `port` for Envoy, 0 for a free one, and waits until it can pick.
    pub async fn start(prefill: &FakeWorker, decode: &FakeWorker, port: &str) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_kvrouter"))
            .args([
                "epp",
                "--prefill",
                &prefill.url,
                "8998",
                "--decode",
                &decode.url,
            ])
            .args(["--host", "127.0.0.1", "--port", "0", "--log-plain"])
            .args(["--grpc-host", "127.0.0.1", "--grpc-port", port])
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (mut front, mut address) = (None, None);
        soon(async {
            while front.is_none() || address.is_none() {
                let line = lines.next_line().await.unwrap();
                let line = line.expect("it ended without serving");
                let Some(at) = line.find("http://127.0.0.1:") else {
                    continue;
                };
                let url = line[at..].split_whitespace().next().unwrap().to_owned();
                if line.contains("external processing on") {
                    address = url.strip_prefix("http://").map(str::to_owned);
                } else if line.contains("listening on") {
                    front = Some(Running::elsewhere(&url));
                }
            }
        })
        .await;
        // Reads on, so that the child never meets a closed or full pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        let front = front.unwrap();
        front.ready(1, 1).await;
        Self {
            child,
            address: address.unwrap(),
            front,
        }
    }

    pub fn port(&self) -> &str {
        self.address.rsplit_once(':').unwrap().1
    }

    pub async fn kill(mut self) {
        self.child.kill().await.unwrap();
    }
}

/// Settings with a picker on a free port.
pub fn config(prefills: &[&str], decodes: &[&str]) -> Config {
    Config {
        epp: Some(EppConfig {
            host: "127.0.0.1".to_owned(),
            port: 0,
            ..EppConfig::default()
        }),
        ..crate::fakes::config(prefills, decodes)
    }
}

/// Changes the picker's settings.
pub fn with_epp(mut config: Config, change: impl FnOnce(&mut EppConfig)) -> Config {
    change(config.epp.as_mut().unwrap());
    config
}

/// Client, Envoy, picker.
pub struct Gateway {
    pub picker: Picker,
    pub envoy: Envoy,
    client: Running,
}

impl Gateway {
    pub async fn start(setup: Setup, config: Config) -> Self {
        let ready = (config.prefills.len(), config.decodes.len());
        Self::before(setup, Picker::start(config).await, ready).await
    }

    /// An Envoy in front of a picker that has so many workers of each role.
    pub async fn before(setup: Setup, picker: Picker, ready: (usize, usize)) -> Self {
        picker.front.ready(ready.0, ready.1).await;
        let envoy = Envoy::start(&setup, &picker.address).await;
        let client = Running::elsewhere(&envoy.url);
        Self {
            picker,
            envoy,
            client,
        }
    }

    pub async fn between(prefill: &FakeWorker, decode: &FakeWorker) -> Self {
        Self::start(Setup::default(), config(&[&prefill.url], &[&decode.url])).await
    }

    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: impl Into<bytes::Bytes>,
    ) -> Response<Incoming> {
        self.client.send(method, path, headers, body).await
    }

    pub async fn post(&self, path: &str, body: impl Into<bytes::Bytes>) -> Response<Incoming> {
        self.client.post(path, body).await
    }

    pub async fn ask(&self, path: &str, body: impl Into<bytes::Bytes>) -> (u16, String) {
        whole(self.post(path, body).await).await
    }

    /// Sends these bytes on a connection of their own and reads until Envoy closes it.
    pub async fn raw(&self, request: &[u8]) -> String {
        let mut stream = self.connect().await;
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        soon(stream.read_to_end(&mut answer)).await.unwrap();
        String::from_utf8(answer).unwrap()
    }

    pub async fn connect(&self) -> TcpStream {
        let address = self.envoy.url.trim_start_matches("http://");
        TcpStream::connect(address).await.unwrap()
    }

    pub async fn metric(&self, line: &str) -> u64 {
        self.picker.front.metric(line).await
    }

    /// Waits until a counter has this value.
    pub async fn until(&self, line: &str, value: u64) {
        soon(async {
            while self.metric(line).await != value {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// `host:port` of a worker.
pub fn endpoint(worker: &FakeWorker) -> String {
    worker.url.trim_start_matches("http://").to_owned()
}
