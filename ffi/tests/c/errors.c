/* Every way to call the library wrongly, and what it says. */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "check.h"

static world_t world;

/* A socket that listens and never speaks; its port. */
static int silent(int *out_port) {
  int fd = socket(AF_INET, SOCK_STREAM, 0);
  struct sockaddr_in address;
  memset(&address, 0, sizeof address);
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t len = sizeof address;
  CHECK(fd >= 0 && bind(fd, (struct sockaddr *)&address, len) == 0 && listen(fd, 8) == 0);
  CHECK(getsockname(fd, (struct sockaddr *)&address, &len) == 0);
  *out_port = ntohs(address.sin_port);
  return fd;
}

static void nulls(void) {
  char *words = NULL;
  size_t len = 0;
  uint64_t peer = 0;
  int32_t fd = 0;
  uint8_t state = 0;
  kvt_completion_t completion;
  kvt_transfer_t *transfer = NULL;
  const kvt_transfer_t *none = NULL;
  kvt_send_request_t send = to_send(1, 100);
  kvt_receive_request_t receive = to_receive(1, NULL, NULL, 0);
  FAILS(KVT_NULL_ARGUMENT, "`engine` is NULL", kvt_engine_info_json(NULL, &words, &len));
  EXPECT(KVT_NULL_ARGUMENT, kvt_completions_fd(NULL, &fd));
  EXPECT(KVT_NULL_ARGUMENT, kvt_completions_drain(NULL, &completion, 1, &len));
  EXPECT(KVT_NULL_ARGUMENT, kvt_peer_connect(NULL, "x", 1, 1, &peer));
  EXPECT(KVT_NULL_ARGUMENT, kvt_peer_disconnect(NULL, 1, NULL, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_send_open(NULL, &send, &transfer));
  EXPECT(KVT_NULL_ARGUMENT, kvt_receive_open(NULL, &receive, &transfer));
  FAILS(KVT_NULL_ARGUMENT, "`transfer` is NULL", kvt_transfer_push(NULL, NULL, 0, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_push_after(NULL, NULL, 0, 0, NULL, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_poll_many(NULL, 1, &state));
  FAILS(KVT_NULL_ARGUMENT, "`transfers[0]` is NULL", kvt_transfer_poll_many(&none, 1, &state));
  EXPECT(KVT_OK, kvt_transfer_poll_many(NULL, 0, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_wait(NULL, KVT_UNTIL_ENDED, 0, NULL, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_cancel(NULL, NULL, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_fence(NULL, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_peer_probe(NULL, 1, 1, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_write(NULL, 1, NULL, 0, 1));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_release_memory(NULL, NULL, 0, 1));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_restore_memory(NULL, NULL, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_bootstrap_new(NULL, 0, NULL, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_bootstrap_call("{}", 2, NULL, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_doctor_json(NULL, 0, NULL, NULL));
  kvt_engine_free(NULL);
  kvt_transfer_free(NULL);
  kvt_bootstrap_free(NULL);
  kvt_text_free(NULL);

  kvt_engine_t *engine = NULL;
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_new(NULL, 0, &world.layout, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_new(NULL, 0, NULL, &engine));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_new(NULL, 5, &world.layout, &engine));
  CHECK(engine == NULL);
  EXPECT(KVT_OK, kvt_engine_new(NULL, 0, &world.layout, &engine));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_info_json(engine, NULL, &len));
  EXPECT(KVT_NULL_ARGUMENT, kvt_completions_fd(engine, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_completions_drain(engine, NULL, 1, &len));
  EXPECT(KVT_NULL_ARGUMENT, kvt_completions_drain(engine, &completion, 1, NULL));
  EXPECT(KVT_OK, kvt_completions_drain(engine, NULL, 0, &len));
  CHECK(len == 0);
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_write(engine, 1, NULL, 1, 1));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_release_memory(engine, NULL, 1, 1));
  EXPECT(KVT_NULL_ARGUMENT, kvt_engine_restore_memory(engine, NULL, 1));
  EXPECT(KVT_NULL_ARGUMENT, kvt_peer_connect(engine, NULL, 3, 1, &peer));
  EXPECT(KVT_NULL_ARGUMENT, kvt_peer_connect(engine, "127.0.0.1:1", 11, 1, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_send_open(engine, NULL, &transfer));
  EXPECT(KVT_NULL_ARGUMENT, kvt_send_open(engine, &send, NULL));
  EXPECT(KVT_NULL_ARGUMENT, kvt_receive_open(engine, NULL, &transfer));
  EXPECT(KVT_NULL_ARGUMENT, kvt_receive_open(engine, &receive, NULL));
  FAILS(KVT_NULL_ARGUMENT, "request.sources", kvt_receive_open(engine, &receive, &transfer));
  CHECK(transfer == NULL);
  EXPECT(KVT_OK, kvt_send_open(engine, &send, &transfer));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_push(transfer, NULL, 1, 0));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_cancel(transfer, NULL, 1));
  EXPECT(KVT_NULL_ARGUMENT, kvt_transfer_poll_many((const kvt_transfer_t *const *)&transfer, 1, NULL));
  kvt_transfer_free(transfer);
  kvt_engine_free(engine);
}

static void configurations(void) {
  kvt_engine_t *engine = NULL;
  int port = 0;
  int fd = silent(&port);
  char config[256];
  FAILS(KVT_BAD_CONFIG, "lanse", start(&world, "{\"lanse\": 2}", &engine));
  FAILS(KVT_BAD_CONFIG, "lanes is 99", start(&world, "{\"lanes\": 99}", &engine));
  FAILS(KVT_BAD_CONFIG, "sometimes", start(&world, "{\"same_host\": \"sometimes\"}", &engine));
  FAILS(KVT_BAD_CONFIG, "line 1", start(&world, "{\"lanes\":", &engine));
  FAILS(KVT_BAD_CONFIG, "host:port", start(&world, "{\"listen\": \"nowhere\"}", &engine));
  FAILS(KVT_BAD_CONFIG, "cannot read", start(&world, "{\"telemetry\": {\"tls\": {\"cert\": \"/nowhere\", \"key\": \"/nowhere\"}}}", &engine));
  FAILS(KVT_BAD_CONFIG, "bootstrap.token", start(&world, "{\"bootstrap\": {\"token\": \"a b\"}}", &engine));
  FAILS(KVT_BAD_ARGUMENT, "UTF-8", kvt_engine_new("{\xff}", 3, &world.layout, &engine));
  FAILS(KVT_RDMA, "RDMA: ",
        start(&world, "{\"rdma\": {\"usage\": \"required\", \"devices\": \"no_such_device\"}}", &engine));
  snprintf(config, sizeof config, "{\"listen\": \"127.0.0.1:%d\"}", port);
  FAILS(KVT_LISTEN, "another process", start(&world, config, &engine));
  snprintf(config, sizeof config, "{\"bootstrap\": {\"listen\": \"127.0.0.1:%d\"}}", port);
  FAILS(KVT_BOOTSTRAP, "in use", start(&world, config, &engine));
  snprintf(config, sizeof config, "{\"telemetry\": {\"listen\": \"127.0.0.1:%d\"}}", port);
  FAILS(KVT_TELEMETRY, "cannot listen", start(&world, config, &engine));
  CHECK(engine == NULL);
  close(fd);
}

static void layouts(void) {
  kvt_engine_t *engine = NULL;
  world_t bad;
#define LAYOUT(status, words, ...)                  \
  do {                                              \
    bad = world;                                    \
    bad.components[0].entries = &bad.entries[0];    \
    bad.components[1].entries = &bad.entries[1];    \
    bad.layout.components = bad.components;         \
    __VA_ARGS__;                                    \
    FAILS(status, words, start(&bad, "", &engine)); \
    CHECK(engine == NULL);                          \
  } while (0)
  LAYOUT(KVT_WRONG_ABI, "version 99 of kvtransfer.h", bad.layout.abi_version = 99);
  LAYOUT(KVT_BAD_ARGUMENT, "layout.reserved", bad.layout.reserved = 1);
  LAYOUT(KVT_BAD_ARGUMENT, "layout.attention", bad.layout.attention = 7);
  LAYOUT(KVT_BAD_ARGUMENT, "kind -3", bad.components[1].kind = -3);
  LAYOUT(KVT_BAD_ARGUMENT, "memory kind 5", bad.entries[0].memory = 5);
  LAYOUT(KVT_BAD_ARGUMENT, "layer id -2", bad.entries[0].layer_id = -2);
  LAYOUT(KVT_REGION, "CUDA device 3", bad.entries[0].memory = KVT_CUDA_MEMORY; bad.entries[0].device = 3);
  LAYOUT(KVT_NULL_ARGUMENT, "entry 0 of component 0", bad.entries[0].address = 0);
  LAYOUT(KVT_NULL_ARGUMENT, "component 0's entries", bad.components[0].entries = NULL);
  LAYOUT(KVT_NULL_ARGUMENT, "layout.components", bad.layout.components = NULL);
  LAYOUT(KVT_NULL_ARGUMENT, "layout.kv_dtype", bad.layout.kv_dtype.data = NULL);
  LAYOUT(KVT_BAD_LAYOUT, "KV dtype", bad.layout.kv_dtype.len = 0);
  LAYOUT(KVT_BAD_LAYOUT, "no stretch of memory", bad.entries[0].len = UINT64_MAX);
  LAYOUT(KVT_BAD_LAYOUT, "items without length", bad.entries[0].item_len = 0);
  LAYOUT(KVT_BAD_LAYOUT, "no KV component", bad.layout.components_len = 0);
  LAYOUT(KVT_BAD_LAYOUT, "tp rank 3", bad.layout.tp_rank = 3);
  LAYOUT(KVT_BAD_LAYOUT, "KV must come first", bad.components[0].kind = KVT_COMPONENT_AUX);
  LAYOUT(KVT_BAD_LAYOUT, "no equal number of K and V", bad.layout.attention = KVT_ATTENTION_HEADS;
         bad.layout.total_kv_heads = 1; bad.layout.rank_kv_heads = 1);
  uint32_t ratios[3] = {4, 128, 4};
  LAYOUT(KVT_BAD_LAYOUT, "compression ratios", bad.layout.end_layer = 3; bad.layout.compression_ratios = ratios;
         bad.layout.compression_ratios_len = 3);
#undef LAYOUT
}

static void peers(void) {
  kvt_engine_t *engine = NULL, *other = NULL;
  uint64_t peer = 0;
  char address[64];
  int port = 0;
  int fd = silent(&port);
  EXPECT(KVT_OK, start(&world, "", &engine));
  snprintf(address, sizeof address, "127.0.0.1:%d", port);
  FAILS(KVT_INCOMPATIBLE, "did not complete the handshake", kvt_peer_connect(engine, address, strlen(address), 100, &peer));
  close(fd);
  FAILS(KVT_UNREACHABLE, "cannot reach", kvt_peer_connect(engine, address, strlen(address), 1000, &peer));
  FAILS(KVT_BAD_ARGUMENT, "host:port", kvt_peer_connect(engine, "nowhere", 7, 1000, &peer));
  world_t unlike = world;
  unlike.layout.kv_dtype = text("float8_e4m3fn");
  EXPECT(KVT_OK, start(&unlike, "{\"listen\": \"127.0.0.1:0\"}", &other));
  listening(other, address, sizeof address);
  FAILS(KVT_REFUSED, "float8_e4m3fn", kvt_peer_connect(engine, address, strlen(address), 5000, &peer));
  FAILS(KVT_UNKNOWN_PEER, "peer 77", kvt_peer_disconnect(engine, 77, "x", 1));
  FAILS(KVT_UNKNOWN_PEER, "not connected", kvt_peer_probe(engine, 77, 10, NULL));
  FAILS(KVT_UNKNOWN_PEER, "not connected", kvt_engine_write(engine, 77, NULL, 0, 10));
  kvt_engine_free(other);
  kvt_engine_free(engine);
}

static void requests(void) {
  kvt_engine_t *engine = NULL, *sender = NULL;
  kvt_transfer_t *transfer = NULL, *second = NULL;
  EXPECT(KVT_OK, start(&world, "{\"node\": {\"transfers_max\": 1}}", &engine));
  kvt_send_request_t send = to_send(0, 100);
  FAILS(KVT_BAD_ARGUMENT, "request.room", kvt_send_open(engine, &send, &transfer));
  send = to_send(5, 20000);
  send.reserved = 1;
  FAILS(KVT_BAD_ARGUMENT, "request.reserved", kvt_send_open(engine, &send, &transfer));
  send.reserved = 0;
  EXPECT(KVT_OK, kvt_send_open(engine, &send, &transfer));
  FAILS(KVT_DUPLICATE_ROOM, "room 5", kvt_send_open(engine, &send, &second));
  send.room = 6;
  FAILS(KVT_QUEUE_FULL, "the limit is 1", kvt_send_open(engine, &send, &second));
  int32_t pages[2] = {0, PAGES};
  kvt_items_t items = {pages, 1};
  FAILS(KVT_NOT_READY, "not granted", kvt_transfer_push(transfer, &items, 1, KVT_LAST));
  FAILS(KVT_BAD_ARGUMENT, "flags", kvt_transfer_push(transfer, &items, 1, 8));
  uint64_t event = 4096;
  FAILS(KVT_NOT_READY, "not granted", kvt_transfer_push_after(transfer, &items, 1, KVT_LAST, &event, 1));
  FAILS(KVT_NULL_ARGUMENT, "events", kvt_transfer_push_after(transfer, &items, 1, KVT_LAST, NULL, 1));
  items.count = 2;
  FAILS(KVT_BAD_ITEMS, "64", kvt_transfer_push(transfer, &items, 1, KVT_LAST));
  kvt_items_t three[3] = {{pages, 1}, {NULL, 0}, {NULL, 0}};
  FAILS(KVT_BAD_ITEMS, "3 item lists for 2 components", kvt_transfer_push(transfer, three, 3, 0));
  FAILS(KVT_BAD_ARGUMENT, "until", kvt_transfer_wait(transfer, 9, 0, NULL, NULL));
  kvt_outcome_t outcome;
  char *reason = (char *)"untouched";
  FAILS(KVT_WOULD_WAIT, "room 5", kvt_transfer_wait(transfer, KVT_UNTIL_READY, 1, &outcome, &reason));
  CHECK(outcome.status == KVT_WOULD_WAIT && outcome.state == KVT_STATE_BOOTSTRAPPING && reason == NULL);
  CHECK(outcome.room == 5 && outcome.is_ready == 0);
  EXPECT(KVT_WOULD_WAIT, kvt_transfer_wait(transfer, KVT_UNTIL_ENDED, 0, NULL, NULL));
  EXPECT(KVT_BAD_ARGUMENT, kvt_transfer_cancel(transfer, "\xff", 1));
  EXPECT(KVT_OK, kvt_transfer_fence(transfer, 5000));
  ends(transfer, KVT_CANCELLED, "cancelled by the application");
  items.count = 1;
  FAILS(KVT_ENDED, "has ended", kvt_transfer_push(transfer, &items, 1, KVT_LAST));
  EXPECT(KVT_OK, kvt_transfer_fence(transfer, 0));
  kvt_transfer_free(transfer);

  send = to_send(8, 20);
  EXPECT(KVT_OK, kvt_send_open(engine, &send, &transfer));
  ends(transfer, KVT_TIMEOUT, "timed out after");
  kvt_transfer_free(transfer);

  transfer = NULL;
  kvt_source_t source = {99, 0, 0};
  kvt_receive_request_t receive = to_receive(9, &source, &items, 1);
  EXPECT(KVT_UNKNOWN_PEER, kvt_receive_open(engine, &receive, &transfer));
  source.dummy = 2;
  FAILS(KVT_BAD_ARGUMENT, "source.dummy", kvt_receive_open(engine, &receive, &transfer));
  source.dummy = 0;
  receive.receivers_expected = 70000;
  FAILS(KVT_BAD_ARGUMENT, "receivers_expected", kvt_receive_open(engine, &receive, &transfer));
  receive.receivers_expected = 1;
  EXPECT(KVT_OK, start(&world, "{\"listen\": \"127.0.0.1:0\"}", &sender));
  source.peer = connect_to(engine, sender);
  items.count = 2;
  EXPECT(KVT_BAD_ITEMS, kvt_receive_open(engine, &receive, &transfer));
  CHECK(transfer == NULL);
  items.count = 1;
  EXPECT(KVT_OK, kvt_receive_open(engine, &receive, &transfer));
  EXPECT(KVT_OK, kvt_peer_disconnect(engine, source.peer, "the node is drained", 19));
  ends(transfer, KVT_PEER_LOST, "the node is drained");
  kvt_transfer_free(transfer);
  kvt_engine_free(sender);
  kvt_engine_free(engine);
}

/* An engine that is freed before its transfers: they say so, and nothing is touched. */
static void outliving(void) {
  kvt_engine_t *engine = NULL, *sender = NULL;
  kvt_transfer_t *live[3] = {NULL, NULL, NULL};
  EXPECT(KVT_OK, start(&world, "", &engine));
  EXPECT(KVT_OK, start(&world, "{\"listen\": \"127.0.0.1:0\"}", &sender));
  kvt_source_t source = {connect_to(engine, sender), 0, 0};
  int32_t page = 1;
  kvt_items_t items = {&page, 1};
  kvt_receive_request_t receive = to_receive(21, &source, &items, 1);
  EXPECT(KVT_OK, kvt_receive_open(engine, &receive, &live[0]));
  kvt_send_request_t send = to_send(22, 20000);
  EXPECT(KVT_OK, kvt_send_open(engine, &send, &live[1]));
  send = to_send(23, 20000);
  EXPECT(KVT_OK, kvt_send_open(engine, &send, &live[2]));
  kvt_engine_free(engine);
  uint8_t states[3] = {9, 9, 9};
  EXPECT(KVT_OK, kvt_transfer_poll_many((const kvt_transfer_t *const *)live, 3, states));
  for (int i = 0; i < 3; i++) {
    CHECK(states[i] == KVT_STATE_FAILED);
    ends(live[i], KVT_SHUTDOWN, "shut down");
    EXPECT(KVT_SHUTDOWN, kvt_transfer_push(live[i], &items, 1, KVT_LAST));
    EXPECT(KVT_OK, kvt_transfer_cancel(live[i], "late", 4));
    kvt_transfer_free(live[i]);
  }
  kvt_engine_free(sender);
}

static void registries(void) {
  kvt_bootstrap_t *registry = NULL;
  char *words = NULL;
  char request[256];
  uint16_t port = 0;
  int taken = 0;
  int fd = silent(&taken);
  FAILS(KVT_BAD_CONFIG, "prot", kvt_bootstrap_new("{\"prot\": 1}", 11, &registry, NULL));
  snprintf(request, sizeof request, "{\"listen\": \"127.0.0.1:%d\"}", taken);
  FAILS(KVT_LISTEN, "in use", kvt_bootstrap_new(request, strlen(request), &registry, NULL));
  CHECK(registry == NULL);
  snprintf(request, sizeof request, "{\"address\": \"127.0.0.1:%d\", \"timeout_ms\": 50, \"call\": \"health\"}", taken);
  FAILS(KVT_BOOTSTRAP, "did not answer", kvt_bootstrap_call(request, strlen(request), &words, NULL));
  close(fd);
  FAILS(KVT_BOOTSTRAP, "cannot connect", kvt_bootstrap_call(request, strlen(request), &words, NULL));
  EXPECT(KVT_OK, kvt_bootstrap_new("{\"listen\": \"127.0.0.1:0\"}", 25, &registry, &port));
  CHECK(port != 0);
  snprintf(request, sizeof request, "{\"address\": \"127.0.0.1:%d\", \"call\": \"server_info\"}", port);
  EXPECT(KVT_NOT_READY, kvt_bootstrap_call(request, strlen(request), &words, NULL));
  snprintf(request, sizeof request, "{\"address\": \"127.0.0.1:%d\", \"call\": \"dance\"}", port);
  FAILS(KVT_BAD_CONFIG, "dance", kvt_bootstrap_call(request, strlen(request), &words, NULL));
  snprintf(request, sizeof request, "{\"address\": \"127.0.0.1:%d\", \"call\": {\"rank\": {\"dp\": 0}}}", port);
  FAILS(KVT_BAD_CONFIG, "missing field", kvt_bootstrap_call(request, strlen(request), &words, NULL));
  snprintf(request, sizeof request, "{\"address\": \"127.0.0.1:%d\", \"ca\": \"/nowhere\", \"call\": \"health\"}", port);
  FAILS(KVT_BAD_CONFIG, "/nowhere", kvt_bootstrap_call(request, strlen(request), &words, NULL));
  CHECK(words == NULL);
  kvt_bootstrap_free(registry);
  FAILS(KVT_BAD_CONFIG, "shoes", kvt_doctor_json("{\"shoes\": 1}", 12, &words, NULL));
  FAILS(KVT_BAD_CONFIG, "cannot read", kvt_doctor_json("{\"devices\": \"/nowhere.json\"}", 28, &words, NULL));
  FAILS(KVT_UNREACHABLE, "127.0.0.1:1", kvt_doctor_json("{\"root\": \"/nowhere\", \"peer\": \"127.0.0.1:1\"}", 43, &words, NULL));
  CHECK(words == NULL);
}

int main(void) {
  CHECK(kvt_abi_version() == KVT_ABI_VERSION);
  CHECK(strchr(kvt_version(), '.') != NULL);
  CHECK(strcmp(kvt_last_error(), "") == 0);
  CHECK(strcmp(kvt_status_text(12345), "unknown status") == 0);
  CHECK(strncmp(kvt_status_text(KVT_TIMEOUT), "KVT_TIMEOUT: ", 13) == 0);
  FAILS(KVT_BAD_ARGUMENT, "level", kvt_log(9, NULL, NULL));
  describe(&world);
  nulls();
  configurations();
  layouts();
  peers();
  requests();
  outliving();
  registries();
  free(world.pages);
  puts("every error path: ok");
  return 0;
}
