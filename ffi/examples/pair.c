/* A pair that moves pages: one process fills a KV cache and sends pages of it, the other receives and compares them.
 *
 *   pair prefill [CONFIG]            says "listening HOST:PORT", serves one request, ends
 *   pair decode HOST:PORT [CONFIG]   asks for it, compares every byte, ends
 *
 * CONFIG is the engine's JSON, such as {"same_host": "off"}, which makes both use TCP. Exit code 0: every byte came.
 *
 *   cc pair.c -I ffi/include -L target/release -lkvtransfer -Wl,-rpath,$PWD/target/release -o pair
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvtransfer.h"

enum {
  LAYERS = 4,        /* each has a buffer of keys and one of values */
  PAGES = 512,       /* in each buffer */
  PAGE_BYTES = 8192, /* 16 tokens of 2 heads of 128 two-byte numbers */
  WANTED = 96,       /* pages of the request */
  CHUNK = 64,        /* pages that prefill has ready first */
  ROWS = 8,          /* metadata rows */
  ROW_BYTES = 64,
  TIMEOUT_MS = 20000
};

static const uint64_t ROOM = 7001;

struct cache {
  unsigned char *buffers[2 * LAYERS];
  unsigned char rows[ROWS][ROW_BYTES];
};

/* Ends the program with the library's own sentence where a call did not work. */
static void must(kvt_status_t status, const char *what) {
  if (status == KVT_OK) return;
  fprintf(stderr, "%s: %s: %s\n", what, kvt_status_text(status), kvt_last_error());
  exit(1);
}

static kvt_text_t text(const char *words) {
  kvt_text_t view = {words, strlen(words)};
  return view;
}

/* What prefill puts into a byte, so that decode can tell whether the right one came. */
static unsigned char expected(int buffer, int page, int byte) {
  return (unsigned char)(buffer * 31 + page * 7 + byte * 13 + byte / 251);
}

/* Which pages of prefill's hold the request, and which of decode's are free: scattered, and not the same. */
static int32_t source_page(int i) { return (i * 5 + 3) % PAGES; }
static int32_t target_page(int i) { return (i * 11 + 200) % PAGES; }

static kvt_engine_t *start(struct cache *cache, const char *config) {
  kvt_entry_t pages[2 * LAYERS];
  for (int i = 0; i < 2 * LAYERS; i++) {
    cache->buffers[i] = calloc(PAGES, PAGE_BYTES);
    if (cache->buffers[i] == NULL) exit(1);
    kvt_entry_t entry = {(uint64_t)(uintptr_t)cache->buffers[i], (uint64_t)PAGES * PAGE_BYTES, PAGE_BYTES, -1,
                         KVT_HOST_MEMORY, 0};
    pages[i] = entry;
  }
  kvt_entry_t rows = {(uint64_t)(uintptr_t)cache->rows, sizeof cache->rows, ROW_BYTES, -1, KVT_HOST_MEMORY, 0};
  kvt_component_t components[2];
  memset(components, 0, sizeof components);
  components[0].kind = KVT_COMPONENT_KV;
  components[0].entries = pages;
  components[0].entries_len = 2 * LAYERS;
  components[1].kind = KVT_COMPONENT_AUX;
  components[1].entries = &rows;
  components[1].entries_len = 1;

  kvt_layout_t layout;
  memset(&layout, 0, sizeof layout);
  layout.abi_version = KVT_ABI_VERSION;
  layout.page_size = 16;
  layout.kv_dtype = text("bfloat16");
  layout.kv_layout = text("nhd");
  layout.attention = KVT_ATTENTION_HEADS;
  layout.total_kv_heads = 2;
  layout.rank_kv_heads = 2;
  layout.tp_size = 1;
  layout.pp_size = 1;
  layout.end_layer = LAYERS;
  layout.components = components;
  layout.components_len = 2;

  kvt_engine_t *engine = NULL;
  must(kvt_engine_new(config, strlen(config), &layout, &engine), "starting the engine");
  return engine;
}

static void stop(kvt_engine_t *engine, struct cache *cache) {
  kvt_engine_free(engine); /* from here on nothing touches the buffers */
  for (int i = 0; i < 2 * LAYERS; i++) free(cache->buffers[i]);
}

/* Waits for the end and says how it went. */
static int conclude(kvt_transfer_t *transfer, const char *who) {
  kvt_outcome_t outcome;
  char *reason = NULL;
  must(kvt_transfer_wait(transfer, KVT_UNTIL_ENDED, TIMEOUT_MS, &outcome, &reason), "waiting for the end");
  if (outcome.status == KVT_OK) {
    printf("%s: %llu bytes in %llu batches, %.3f ms\n", who, (unsigned long long)outcome.bytes,
           (unsigned long long)outcome.batches, (double)outcome.moving_ns / 1e6);
  } else {
    fprintf(stderr, "%s: %s: %s\n", who, kvt_status_text(outcome.status), reason);
  }
  kvt_text_free(reason);
  kvt_transfer_free(transfer);
  return outcome.status == KVT_OK ? 0 : 1;
}

/* The value of a text field of the engine's JSON, without a JSON library. */
static void field(const char *json, const char *name, char *out, size_t capacity) {
  char key[64];
  snprintf(key, sizeof key, "\"%s\":\"", name);
  const char *at = strstr(json, key);
  size_t len = 0;
  if (at != NULL) {
    at += strlen(key);
    len = strcspn(at, "\"");
    if (len >= capacity) len = capacity - 1;
    memcpy(out, at, len);
  }
  out[len] = '\0';
}

static int prefill(const char *config) {
  struct cache cache;
  memset(&cache, 0, sizeof cache);
  kvt_engine_t *engine = start(&cache, config);
  char *info = NULL, address[64];
  must(kvt_engine_info_json(engine, &info, NULL), "asking for the address");
  field(info, "listen", address, sizeof address);
  kvt_text_free(info);
  printf("listening %s\n", address);
  fflush(stdout);

  /* The model runs: it fills its pages and the request's metadata row. */
  for (int b = 0; b < 2 * LAYERS; b++)
    for (int p = 0; p < PAGES; p++)
      for (int i = 0; i < PAGE_BYTES; i++) cache.buffers[b][(size_t)p * PAGE_BYTES + i] = expected(b, p, i);
  memcpy(cache.rows[2], &ROOM, sizeof ROOM);

  kvt_send_request_t request = {ROOM, 1, TIMEOUT_MS, 0};
  kvt_transfer_t *transfer = NULL;
  must(kvt_send_open(engine, &request, &transfer), "opening the room");
  must(kvt_transfer_wait(transfer, KVT_UNTIL_READY, TIMEOUT_MS, NULL, NULL), "waiting for decode's pages");
  int32_t pages[WANTED], row = 2;
  for (int i = 0; i < WANTED; i++) pages[i] = source_page(i);
  kvt_items_t first[1] = {{pages, CHUNK}};
  must(kvt_transfer_push(transfer, first, 1, 0), "sending the first chunk");
  kvt_items_t last[2] = {{pages + CHUNK, WANTED - CHUNK}, {&row, 1}};
  must(kvt_transfer_push(transfer, last, 2, KVT_LAST), "sending the last chunk");
  int code = conclude(transfer, "prefill");
  stop(engine, &cache);
  return code;
}

static int decode(const char *address, const char *config) {
  struct cache cache;
  memset(&cache, 0, sizeof cache);
  kvt_engine_t *engine = start(&cache, config);
  uint64_t peer = 0;
  must(kvt_peer_connect(engine, address, strlen(address), TIMEOUT_MS, &peer), "connecting to prefill");
  char *info = NULL, path[32];
  must(kvt_engine_info_json(engine, &info, NULL), "asking for the path");
  field(info, "path", path, sizeof path);
  kvt_text_free(info);

  int32_t pages[WANTED], row = 5;
  for (int i = 0; i < WANTED; i++) pages[i] = target_page(i);
  kvt_items_t items[2] = {{pages, WANTED}, {&row, 1}};
  kvt_source_t source = {peer, 0, 0};
  kvt_receive_request_t request;
  memset(&request, 0, sizeof request);
  request.room = ROOM;
  request.timeout_ms = TIMEOUT_MS;
  request.receivers_expected = 1;
  request.sources = &source;
  request.sources_len = 1;
  request.items = items;
  request.items_len = 2;
  kvt_transfer_t *transfer = NULL;
  must(kvt_receive_open(engine, &request, &transfer), "granting pages");
  int code = conclude(transfer, "decode");

  long wrong = 0;
  for (int b = 0; b < 2 * LAYERS; b++)
    for (int p = 0; p < PAGES; p++) {
      int from = -1; /* a page that was not granted must still be empty */
      for (int i = 0; i < WANTED; i++)
        if (target_page(i) == p) from = source_page(i);
      for (int i = 0; i < PAGE_BYTES; i++)
        wrong += cache.buffers[b][(size_t)p * PAGE_BYTES + i] != (from < 0 ? 0 : expected(b, from, i));
    }
  wrong += memcmp(cache.rows[5], &ROOM, sizeof ROOM) != 0;
  printf("path %s, %ld bytes differ\n", path, wrong);
  stop(engine, &cache);
  return code != 0 || wrong != 0;
}

int main(int argc, char **argv) {
  if (kvt_abi_version() != KVT_ABI_VERSION) {
    fprintf(stderr, "this program needs version %d of the ABI, the library has %u\n", KVT_ABI_VERSION, kvt_abi_version());
    return 2;
  }
  if (argc >= 2 && strcmp(argv[1], "prefill") == 0)
    return prefill(argc > 2 ? argv[2] : "{\"listen\": \"127.0.0.1:0\"}");
  if (argc >= 3 && strcmp(argv[1], "decode") == 0) return decode(argv[2], argc > 3 ? argv[3] : "{}");
  fprintf(stderr, "usage: pair prefill [CONFIG] | pair decode HOST:PORT [CONFIG]\n");
  return 2;
}
