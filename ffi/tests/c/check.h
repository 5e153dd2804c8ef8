/* What the test programs share: checks that end the program, and a small engine to try things on. */
#ifndef KVT_CHECK_H
#define KVT_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "kvtransfer.h"

#define EXPECT(wanted, call)                                                                              \
  do {                                                                                                    \
    kvt_status_t got_ = (call);                                                                           \
    if (got_ != (wanted)) {                                                                               \
      fprintf(stderr, "%s:%d: %s\n  gave %s\n  last error: %s\n  expected %s\n", __FILE__, __LINE__, #call, \
              kvt_status_text(got_), kvt_last_error(), kvt_status_text(wanted));                          \
      exit(1);                                                                                            \
    }                                                                                                     \
  } while (0)

#define CHECK(condition)                                                                          \
  do {                                                                                            \
    if (!(condition)) {                                                                           \
      fprintf(stderr, "%s:%d: %s is false (%s)\n", __FILE__, __LINE__, #condition, kvt_last_error()); \
      exit(1);                                                                                    \
    }                                                                                             \
  } while (0)

/* The call fails so, and says these words. */
#define FAILS(wanted, words, call)                 \
  do {                                             \
    EXPECT(wanted, call);                          \
    CHECK(strstr(kvt_last_error(), words) != NULL); \
  } while (0)

enum { PAGES = 64, PAGE_BYTES = 4096, ROWS = 4, ROW_BYTES = 64 };

/* A latent cache of one layer and its metadata rows, with the description of both. Must not move. */
typedef struct world_t {
  unsigned char *pages;
  unsigned char rows[ROWS * ROW_BYTES];
  kvt_entry_t entries[2];
  kvt_component_t components[2];
  kvt_layout_t layout;
} world_t;

static inline kvt_text_t text(const char *words) {
  kvt_text_t view;
  view.data = words;
  view.len = strlen(words);
  return view;
}

static inline void describe(world_t *world) {
  memset(world, 0, sizeof *world);
  world->pages = (unsigned char *)calloc(PAGES, PAGE_BYTES);
  CHECK(world->pages != NULL);
  world->entries[0].address = (uint64_t)(uintptr_t)world->pages;
  world->entries[0].len = (uint64_t)PAGES * PAGE_BYTES;
  world->entries[0].item_len = PAGE_BYTES;
  world->entries[0].layer_id = -1;
  world->entries[1].address = (uint64_t)(uintptr_t)world->rows;
  world->entries[1].len = sizeof world->rows;
  world->entries[1].item_len = ROW_BYTES;
  world->entries[1].layer_id = -1;
  world->components[0].kind = KVT_COMPONENT_KV;
  world->components[1].kind = KVT_COMPONENT_AUX;
  for (int i = 0; i < 2; i++) {
    world->components[i].entries = &world->entries[i];
    world->components[i].entries_len = 1;
  }
  world->layout.abi_version = KVT_ABI_VERSION;
  world->layout.page_size = 16;
  world->layout.kv_dtype = text("bfloat16");
  world->layout.kv_layout = text("nhd");
  world->layout.attention = KVT_ATTENTION_LATENT;
  world->layout.tp_size = 1;
  world->layout.pp_size = 1;
  world->layout.end_layer = 1;
  world->layout.components = world->components;
  world->layout.components_len = 2;
}

static inline kvt_status_t start(const world_t *world, const char *config, kvt_engine_t **out) {
  return kvt_engine_new(config, strlen(config), &world->layout, out);
}

/* Where an engine listens. */
static inline void listening(const kvt_engine_t *engine, char *out, size_t capacity) {
  char *info = NULL;
  EXPECT(KVT_OK, kvt_engine_info_json(engine, &info, NULL));
  const char *at = strstr(info, "\"listen\":\"");
  CHECK(at != NULL);
  at += strlen("\"listen\":\"");
  size_t len = strcspn(at, "\"");
  CHECK(len < capacity);
  memcpy(out, at, len);
  out[len] = '\0';
  kvt_text_free(info);
}

static inline uint64_t connect_to(const kvt_engine_t *engine, const kvt_engine_t *other) {
  char address[64];
  uint64_t peer = 0;
  listening(other, address, sizeof address);
  EXPECT(KVT_OK, kvt_peer_connect(engine, address, strlen(address), 5000, &peer));
  return peer;
}

static inline kvt_send_request_t to_send(uint64_t room, uint32_t timeout_ms) {
  kvt_send_request_t request;
  memset(&request, 0, sizeof request);
  request.room = room;
  request.user_data = room + 1000;
  request.timeout_ms = timeout_ms;
  return request;
}

static inline kvt_receive_request_t to_receive(uint64_t room, const kvt_source_t *source, const kvt_items_t *items,
                                               size_t items_len) {
  kvt_receive_request_t request;
  memset(&request, 0, sizeof request);
  request.room = room;
  request.user_data = room + 2000;
  request.timeout_ms = 20000;
  request.receivers_expected = 1;
  request.sources = source;
  request.sources_len = 1;
  request.items = items;
  request.items_len = items_len;
  return request;
}

/* The transfer ends so, and says these words. */
static inline void ends(const kvt_transfer_t *transfer, kvt_status_t wanted, const char *words) {
  kvt_outcome_t outcome;
  char *reason = NULL;
  EXPECT(KVT_OK, kvt_transfer_wait(transfer, KVT_UNTIL_ENDED, 20000, &outcome, &reason));
  if (outcome.status != wanted || (reason != NULL) != (words != NULL) ||
      (words != NULL && strstr(reason, words) == NULL)) {
    fprintf(stderr, "room %llu ended with %s: %s\n  expected %s: %s\n", (unsigned long long)outcome.room,
            kvt_status_text(outcome.status), reason ? reason : "-", kvt_status_text(wanted), words ? words : "-");
    exit(1);
  }
  CHECK(outcome.state == (wanted == KVT_OK ? KVT_STATE_SUCCESS : KVT_STATE_FAILED));
  kvt_text_free(reason);
}

#endif
