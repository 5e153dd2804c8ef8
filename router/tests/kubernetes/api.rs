//! An API server that does what a test tells it: lists, watches with bookmarks, forgets old versions, breaks connections,
//! loses deletions, is slow or gone.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde_json::{Value as Json, json};
use tokio::sync::{mpsc, watch};

/// Far beyond anything that should happen; reaching it is a failure.
const PATIENCE: Duration = Duration::from_secs(20);

/// News that wait for one watch.
const NEWS_MAX: usize = 1024;

type Piece = Result<Bytes, std::io::Error>;

struct Watcher {
    collection: String,
    selector: String,
    pieces: mpsc::Sender<Piece>,
}

#[derive(Default)]
struct Cluster {
    version: u64,
    /// Objects by collection and `namespace/name`.
    objects: BTreeMap<String, BTreeMap<String, Json>>,
    /// What happened, with its version.
    history: Vec<(u64, String, &'static str, Json)>,
    /// Versions up to this one are forgotten.
    compacted: u64,
    watchers: Vec<Watcher>,
    /// Plurals that the server does not know.
    unknown: Vec<String>,
    /// Method and path of every write, and its body.
    writes: Vec<(String, String, Json)>,
    lists: BTreeMap<String, usize>,
    watches: BTreeMap<String, usize>,
}

struct Inner {
    cluster: Mutex<Cluster>,
    /// Answers everything with this status, if it is not 0.
    broken: AtomicU16,
    /// Answers a watch of a forgotten version with a status instead of an event.
    gone_by_status: AtomicBool,
    /// Sends watch events in pieces of this many bytes; 0 is whole lines.
    piece_bytes: AtomicUsize,
    /// Lists wait while this is true.
    lists_held: watch::Sender<bool>,
}

/// The server, and the hand of the test on it.
pub struct ApiServer {
    inner: Arc<Inner>,
    kubeconfig: PathBuf,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.kubeconfig);
    }
}

/// Where the objects of a kind are. Good enough for every kind that the tests name.
fn collection_of(object: &Json) -> String {
    let version = object["apiVersion"].as_str().expect("an apiVersion");
    let kind = object["kind"].as_str().expect("a kind").to_lowercase();
    let plural = match kind.strip_suffix('y') {
        Some(stem) if kind.ends_with("policy") => format!("{stem}ies"),
        _ => format!("{kind}s"),
    };
    if version.contains('/') {
        format!("/apis/{version}/{plural}")
    } else {
        format!("/api/{version}/{plural}")
    }
}

fn name_of(object: &Json) -> String {
    let meta = &object["metadata"];
    let namespace = meta["namespace"].as_str().unwrap_or("default");
    format!("{namespace}/{}", meta["name"].as_str().expect("a name"))
}

fn selected(object: &Json, selector: &str) -> bool {
    let mut pairs = selector.split(',').filter(|pair| !pair.is_empty());
    pairs.all(|pair| {
        let (key, value) = pair.split_once('=').expect("an equality");
        object["metadata"]["labels"][key] == value
    })
}

impl ApiServer {
    pub async fn start() -> Self {
        let inner = Arc::new(Inner {
            cluster: Mutex::new(Cluster {
                version: 100,
                ..Cluster::default()
            }),
            broken: AtomicU16::new(0),
            gone_by_status: AtomicBool::new(false),
            piece_bytes: AtomicUsize::new(0),
            lists_held: watch::channel(false).0,
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let url = format!("http://{address}");
        let app = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&inner));
        tokio::spawn(async move { axum::serve(listener, app).await });
        let name = format!("kvrouter-test-{}-{}", std::process::id(), address.port());
        let kubeconfig = std::env::temp_dir().join(name);
        let text = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "clusters": [{"name": "test", "cluster": {"server": url}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "default"}}],
            "users": [{"name": "test", "user": {}}],
        });
        std::fs::write(&kubeconfig, text.to_string()).unwrap();
        Self { inner, kubeconfig }
    }

    /// A file with which clients find the server.
    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.inner.cluster.lock().unwrap()
    }

    /// Makes or replaces an object.
    pub fn apply(&self, object: &Json) {
        self.inner.put(&collection_of(object), object.clone());
    }

    /// Changes an object.
    pub fn change(&self, collection: &str, name: &str, change: impl FnOnce(&mut Json)) {
        let mut object = self.object(collection, name).expect("the object");
        change(&mut object);
        self.inner.put(collection, object);
    }

    pub fn delete(&self, collection: &str, name: &str) {
        self.inner.delete(collection, &format!("default/{name}"));
    }

    /// Deletes an object without telling any watch of it.
    pub fn lose(&self, collection: &str, name: &str) {
        let mut cluster = self.cluster();
        cluster.version += 1;
        let all = cluster.objects.get_mut(collection).unwrap();
        all.remove(&format!("default/{name}")).expect("the object");
    }

    pub fn object(&self, collection: &str, name: &str) -> Option<Json> {
        let cluster = self.cluster();
        let found = cluster.objects.get(collection)?;
        found.get(&format!("default/{name}")).cloned()
    }

    /// All objects of a collection.
    pub fn all(&self, collection: &str) -> Vec<Json> {
        let cluster = self.cluster();
        let found = cluster.objects.get(collection);
        found
            .into_iter()
            .flat_map(BTreeMap::values)
            .cloned()
            .collect()
    }

    /// Ends all watches: cleanly, or in the middle of a line.
    pub fn drop_watches(&self, cleanly: bool) {
        for watcher in self.cluster().watchers.drain(..) {
            if !cleanly {
                let _ = watcher
                    .pieces
                    .try_send(Ok(Bytes::from_static(b"{\"type\":\"MOD")));
                let broken = std::io::Error::other("the test broke it");
                let _ = watcher.pieces.try_send(Err(broken));
            }
        }
    }

    /// Forgets what happened so far.
    pub fn compact(&self) {
        let mut cluster = self.cluster();
        cluster.version += 1;
        cluster.compacted = cluster.version;
        cluster.history.clear();
    }

    /// Tells all watches the present version.
    pub fn bookmark(&self) {
        let mut cluster = self.cluster();
        cluster.version += 1;
        let version = cluster.version.to_string();
        let event = json!({"type": "BOOKMARK", "object": {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"resourceVersion": version}}});
        let line = Bytes::from(format!("{event}\n"));
        for watcher in &cluster.watchers {
            let _ = watcher.pieces.try_send(Ok(line.clone()));
        }
    }

    /// Every answer is this status; 0 ends that.
    pub fn set_broken(&self, status: u16) {
        self.inner.broken.store(status, Ordering::Relaxed);
    }

    pub fn set_gone_by_status(&self, by_status: bool) {
        self.inner
            .gone_by_status
            .store(by_status, Ordering::Relaxed);
    }

    pub fn set_piece_bytes(&self, bytes: usize) {
        self.inner.piece_bytes.store(bytes, Ordering::Relaxed);
    }

    /// Lists get no answer until this is taken back.
    pub fn hold_lists(&self, held: bool) {
        self.inner.lists_held.send_replace(held);
    }

    /// The server knows no objects of this plural.
    pub fn forget_kind(&self, plural: &str) {
        self.cluster().unknown.push(plural.to_owned());
    }

    /// The server knows all kinds again.
    pub fn learn_kinds(&self) {
        self.cluster().unknown.clear();
    }

    pub fn lists(&self, collection: &str) -> usize {
        self.cluster().lists.get(collection).copied().unwrap_or(0)
    }

    pub fn watches(&self, collection: &str) -> usize {
        self.cluster().watches.get(collection).copied().unwrap_or(0)
    }

    /// Writes so far: method, path and body.
    pub fn writes(&self) -> Vec<(String, String, Json)> {
        self.cluster().writes.clone()
    }

    /// Waits until `holds`.
    pub async fn until(&self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let all = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = tokio::time::timeout(PATIENCE, all).await;
        assert!(waited.is_ok(), "it never came to this: {what}");
    }
}

impl Inner {
    fn put(&self, collection: &str, mut object: Json) {
        let mut cluster = self.cluster.lock().unwrap();
        cluster.version += 1;
        let version = cluster.version;
        object["metadata"]["resourceVersion"] = version.to_string().into();
        if !object["metadata"]["namespace"].is_string() {
            object["metadata"]["namespace"] = "default".into();
        }
        let name = name_of(&object);
        if !object["metadata"]["uid"].is_string() {
            object["metadata"]["uid"] = format!("uid-{collection}-{name}").into();
        }
        if !object["metadata"]["creationTimestamp"].is_string() {
            object["metadata"]["creationTimestamp"] = "2026-01-01T00:00:00Z".into();
        }
        let all = cluster.objects.entry(collection.to_owned()).or_default();
        let before = all.get(&name).cloned();
        let generation = before
            .as_ref()
            .map_or(0, |old| old["metadata"]["generation"].as_i64().unwrap_or(0));
        let same_spec = before
            .as_ref()
            .is_some_and(|old| old["spec"] == object["spec"]);
        object["metadata"]["generation"] = (generation + i64::from(!same_spec)).into();
        all.insert(name, object.clone());
        let kind = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        cluster.tell(
            collection,
            kind,
            object,
            before.as_ref(),
            self.piece_bytes.load(Ordering::Relaxed),
        );
    }

    fn delete(&self, collection: &str, name: &str) {
        let mut cluster = self.cluster.lock().unwrap();
        cluster.version += 1;
        let version = cluster.version.to_string();
        let all = cluster.objects.get_mut(collection).expect("the collection");
        let mut object = all.remove(name).expect("the object");
        object["metadata"]["resourceVersion"] = version.into();
        cluster.tell(
            collection,
            "DELETED",
            object,
            None,
            self.piece_bytes.load(Ordering::Relaxed),
        );
    }
}

impl Cluster {
    fn tell(
        &mut self,
        collection: &str,
        kind: &'static str,
        object: Json,
        before: Option<&Json>,
        piece_bytes: usize,
    ) {
        let version = self.version;
        for watcher in &self.watchers {
            if watcher.collection != collection {
                continue;
            }
            let fits = selected(&object, &watcher.selector);
            let did = before.is_some_and(|before| selected(before, &watcher.selector));
            // An object that a watch no longer selects is deleted for it.
            let kind = match (fits, did) {
                (true, _) => kind,
                (false, true) => "DELETED",
                (false, false) => continue,
            };
            send(
                &watcher.pieces,
                &json!({"type": kind, "object": object}),
                piece_bytes,
            );
        }
        self.history
            .push((version, collection.to_owned(), kind, object));
    }
}

fn send(pieces: &mpsc::Sender<Piece>, event: &Json, piece_bytes: usize) {
    let line = Bytes::from(format!("{event}\n"));
    let size = if piece_bytes == 0 {
        line.len()
    } else {
        piece_bytes
    };
    for piece in line.chunks(size) {
        let _ = pieces.try_send(Ok(Bytes::copy_from_slice(piece)));
    }
}

fn status(code: u16, reason: &str, message: &str) -> Response {
    let body = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": reason, "code": code});
    let code = axum::http::StatusCode::from_u16(code).unwrap();
    (
        code,
        [("content-type", "application/json")],
        body.to_string(),
    )
        .into_response()
}

fn answer_json(code: u16, body: &Json) -> Response {
    let code = axum::http::StatusCode::from_u16(code).unwrap();
    (
        code,
        [("content-type", "application/json")],
        body.to_string(),
    )
        .into_response()
}

/// A path's collection without its namespace, the name in it, and whether its status is meant.
fn parsed(path: &str) -> (String, Option<String>, bool) {
    let parts: Vec<&str> = path.split('/').skip(1).collect();
    let root = if parts[0] == "api" { 2 } else { 3 };
    let prefix = parts[..root].join("/");
    let rest = match parts.get(root) {
        Some(&"namespaces") if parts.len() > root + 2 => &parts[root + 2..],
        _ => &parts[root..],
    };
    let name = rest.get(1).map(|name| format!("default/{name}"));
    (
        format!("/{prefix}/{}", rest[0]),
        name,
        rest.get(2) == Some(&"status"),
    )
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let broken = inner.broken.load(Ordering::Relaxed);
    if broken != 0 {
        return status(broken, "Broken", "the test broke it");
    }
    let (collection, name, is_status) = parsed(parts.uri.path());
    let plural = collection.rsplit('/').next().unwrap().to_owned();
    if inner.cluster.lock().unwrap().unknown.contains(&plural) {
        return status(
            404,
            "NotFound",
            "the server could not find the requested resource",
        );
    }
    let query: BTreeMap<String, String> = parts
        .uri
        .query()
        .unwrap_or_default()
        .split('&')
        .filter_map(|pair| pair.split_once('='))
        .map(|(key, value)| {
            let value = value
                .replace("%3D", "=")
                .replace("%2F", "/")
                .replace("%2C", ",");
            (key.to_owned(), value)
        })
        .collect();
    let selector = query.get("labelSelector").cloned().unwrap_or_default();
    match (parts.method.as_str(), name) {
        ("GET", None) if query.contains_key("watch") => {
            let from = query
                .get("resourceVersion")
                .and_then(|text| text.parse().ok());
            watched(&inner, collection, selector, from.unwrap_or(0))
        }
        ("GET", None) => list(&inner, &collection, &selector).await,
        ("GET", Some(name)) => {
            let cluster = inner.cluster.lock().unwrap();
            let found = cluster
                .objects
                .get(&collection)
                .and_then(|all| all.get(&name));
            found.map_or_else(
                || status(404, "NotFound", "not found"),
                |object| answer_json(200, object),
            )
        }
        (method, name) => {
            let body = to_bytes(body, usize::MAX).await.unwrap();
            let body: Json = serde_json::from_slice(&body).unwrap();
            let written = (method.to_owned(), parts.uri.path().to_owned(), body.clone());
            inner.cluster.lock().unwrap().writes.push(written);
            let is_apply = parts.headers.get("content-type").is_some_and(|kind| {
                kind.to_str()
                    .unwrap()
                    .starts_with("application/apply-patch")
            });
            match (method, name) {
                ("POST", None) => create(&inner, &collection, body),
                ("PATCH", Some(name)) => {
                    patch(&inner, &collection, &name, &body, is_status, is_apply)
                }
                _ => status(405, "MethodNotAllowed", "the test does not know this"),
            }
        }
    }
}

async fn list(inner: &Inner, collection: &str, selector: &str) -> Response {
    *inner
        .cluster
        .lock()
        .unwrap()
        .lists
        .entry(collection.to_owned())
        .or_default() += 1;
    let mut held = inner.lists_held.subscribe();
    let _ = held.wait_for(|held| !held).await;
    let cluster = inner.cluster.lock().unwrap();
    let found = cluster
        .objects
        .get(collection)
        .into_iter()
        .flat_map(BTreeMap::values);
    let items: Vec<&Json> = found.filter(|object| selected(object, selector)).collect();
    let version = cluster.version.to_string();
    let body = json!({"kind": "List", "apiVersion": "v1", "metadata": {"resourceVersion": version}, "items": items});
    answer_json(200, &body)
}

fn watched(inner: &Inner, collection: String, selector: String, from: u64) -> Response {
    let mut cluster = inner.cluster.lock().unwrap();
    *cluster.watches.entry(collection.clone()).or_default() += 1;
    let (pieces, news) = mpsc::channel(NEWS_MAX);
    if from < cluster.compacted {
        if inner.gone_by_status.load(Ordering::Relaxed) {
            return status(410, "Expired", "too old resource version");
        }
        let gone = json!({"type": "ERROR", "object": {"kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": "Failure", "message": "too old resource version", "reason": "Expired", "code": 410}});
        send(&pieces, &gone, 0);
    } else {
        for (version, place, kind, object) in &cluster.history {
            if *version > from && *place == collection && selected(object, &selector) {
                send(&pieces, &json!({"type": kind, "object": object}), 0);
            }
        }
        cluster.watchers.push(Watcher {
            collection,
            selector,
            pieces,
        });
    }
    let pieces = stream::unfold(
        news,
        |mut news| async move { Some((news.recv().await?, news)) },
    );
    (
        [("content-type", "application/json")],
        Body::from_stream(pieces),
    )
        .into_response()
}

fn create(inner: &Inner, collection: &str, object: Json) -> Response {
    let name = name_of(&object);
    let exists = {
        let cluster = inner.cluster.lock().unwrap();
        cluster
            .objects
            .get(collection)
            .is_some_and(|all| all.contains_key(&name))
    };
    if exists {
        return status(409, "AlreadyExists", "it exists");
    }
    inner.put(collection, object.clone());
    answer_json(201, &object)
}

fn patch(
    inner: &Inner,
    collection: &str,
    name: &str,
    body: &Json,
    is_status: bool,
    is_apply: bool,
) -> Response {
    let found = {
        let cluster = inner.cluster.lock().unwrap();
        cluster
            .objects
            .get(collection)
            .and_then(|all| all.get(name))
            .cloned()
    };
    let Some(mut object) = found else {
        return status(404, "NotFound", "not found");
    };
    let expected = &body["metadata"]["resourceVersion"];
    if expected.is_string() && *expected != object["metadata"]["resourceVersion"] {
        return status(409, "Conflict", "the object has been modified");
    }
    if is_status && is_apply {
        // Lists of conditions merge by their type.
        let mut conditions = object["status"]["conditions"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        for wanted in body["status"]["conditions"].as_array().expect("conditions") {
            conditions.retain(|old| old["type"] != wanted["type"]);
            conditions.push(wanted.clone());
        }
        object["status"]["conditions"] = conditions.into();
    } else if is_status {
        merge(&mut object["status"], &body["status"]);
    } else {
        merge(&mut object, body);
    }
    inner.put(collection, object.clone());
    answer_json(200, &object)
}

/// A JSON merge patch.
fn merge(target: &mut Json, patch: &Json) {
    let Some(members) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in members {
        merge(&mut target[key], value);
    }
}
