/*
 * kvtransfer: moves paged KV caches between prefill and decode workers.
 *
 * Made from ffi/src by cbindgen (`KVT_WRITE_HEADER=1 cargo test -p kvtransfer-ffi --test header`). Do not edit.
 *
 * Conventions
 *   Status     Functions return a kvt_status_t: KVT_OK, or why nothing was done. kvt_status_text() names it and
 *              kvt_last_error() has this thread's last failure as a sentence. No function lets a panic out.
 *   Handles    kvt_engine_t, kvt_transfer_t and kvt_bootstrap_t are opaque. What a _new or _open function gives is
 *              the caller's until it is given back to the matching _free, once. free(NULL) does nothing. After
 *              KVT_PANIC a handle can only be freed.
 *   Arguments  Texts are UTF-8, a pointer and a length in bytes; a list is a pointer and a count; NULL with 0 is
 *              the empty one. Everything passed in is read during the call only. Fields called `reserved` are 0.
 *   Results    out_ places come last. They are written on success only, unless the function says otherwise. Texts
 *              that come out are freed with kvt_text_free.
 *   Threads    Any thread may call anything, with any handle, at any time, except that nothing may be called with a
 *              handle while or after it is freed. Only functions with a timeout_ms, the _free functions,
 *              kvt_transfer_fence, kvt_bootstrap_call and kvt_doctor_json wait.
 */


#ifndef KVTRANSFER_H
#define KVTRANSFER_H

#include <stddef.h>
#include <stdint.h>

/**
 * Version of this header. It changes whenever a signature, a layout or a meaning does. Compare it with
 * `kvt_abi_version()` before anything else, and put it into `kvt_layout_t.abi_version`.
 */
#define KVT_ABI_VERSION 1

/**
 * `kvt_log`: something failed that needs attention.
 */
#define KVT_LOG_ERROR 1

/**
 * `kvt_log`: something is wrong, and the library goes on.
 */
#define KVT_LOG_WARN 2

/**
 * `kvt_log`: what is worth a line in production.
 */
#define KVT_LOG_INFO 3

/**
 * `kvt_log`: for looking into a problem.
 */
#define KVT_LOG_DEBUG 4

/**
 * `kvt_log`: everything.
 */
#define KVT_LOG_TRACE 5

/**
 * `kvt_entry_t.memory`: ordinary memory of this process.
 */
#define KVT_HOST_MEMORY 0

/**
 * `kvt_entry_t.memory`: memory of the CUDA device `device`.
 */
#define KVT_CUDA_MEMORY 1

/**
 * `kvt_component_t.kind`: the paged KV cache; its items are pages. First, and exactly once.
 */
#define KVT_COMPONENT_KV 0

/**
 * `kvt_component_t.kind`: a state component, by SGLang's name for it; its items are slots or pages.
 */
#define KVT_COMPONENT_STATE 1

/**
 * `kvt_component_t.kind`: the metadata rows; its items are slots. Last, and at most once. The last entry's bytes become
 * visible last.
 */
#define KVT_COMPONENT_AUX 2

/**
 * `kvt_component_t.kind`: memory that is only written and read by address (`kvt_engine_write`). It may stand anywhere, is
 * no component for lists of items, and `item_len` is not looked at. A layout with nothing else needs no other field but
 * `abi_version`.
 */
#define KVT_COMPONENT_MEMORY 3

/**
 * `kvt_layout_t.attention`: keys and values per head; entries are all K layers, then all V layers, then the draft
 * model's.
 */
#define KVT_ATTENTION_HEADS 0

/**
 * `kvt_layout_t.attention`: a latent cache (MLA), one entry per layer, the same on every tensor-parallel rank.
 */
#define KVT_ATTENTION_LATENT 1

/**
 * `kvt_transfer_poll_many`: it failed; `kvt_transfer_wait` says why. The numbers are SGLang's `KVPoll`.
 */
#define KVT_STATE_FAILED 0

/**
 * `kvt_transfer_poll_many`: the sender waits for grants.
 */
#define KVT_STATE_BOOTSTRAPPING 1

/**
 * `kvt_transfer_poll_many`: pages may be pushed; none has moved yet.
 */
#define KVT_STATE_WAITING_FOR_INPUT 2

/**
 * `kvt_transfer_poll_many`: pages are moving.
 */
#define KVT_STATE_TRANSFERRING 3

/**
 * `kvt_transfer_poll_many`: every page has arrived.
 */
#define KVT_STATE_SUCCESS 4

/**
 * `kvt_transfer_push`: no chunk follows.
 */
#define KVT_LAST 1

/**
 * `kvt_transfer_wait`: until every receiver has granted its pages, or the end.
 */
#define KVT_UNTIL_READY 1

/**
 * `kvt_transfer_wait`: until the end.
 */
#define KVT_UNTIL_ENDED 2

/**
 * A running bootstrap registry that ranks of SGLang, ours and stock ones, register with. Made by `kvt_bootstrap_new`,
 * ended by `kvt_bootstrap_free`.
 */
typedef struct kvt_bootstrap_t kvt_bootstrap_t;

/**
 * One rank's engine: its listener, its peers, its transfers. Made by `kvt_engine_new`, ended by `kvt_engine_free`. Any
 * thread may use it, several at a time.
 */
typedef struct kvt_engine_t kvt_engine_t;

/**
 * One side's part in one room. Made by `kvt_send_open` or `kvt_receive_open`, given back by `kvt_transfer_free`. Any
 * thread may use it, several at a time. It may outlive its engine, and then says `KVT_SHUTDOWN`.
 */
typedef struct kvt_transfer_t kvt_transfer_t;

/**
 * What a function returns: `KVT_OK`, or why it did nothing. 1xx: the call is wrong; 2xx: this host refuses; 3xx: the
 * peer; 4xx: the transfer; 9xx: the library itself. Codes are never renumbered.
 */
typedef int32_t kvt_status_t;

/**
 * Takes one line of the library's log: a `KVT_LOG_` level, the part of the library that speaks, the message, and what
 * was given to `kvt_log`. Both texts are UTF-8 without NUL at the end, good during the call only.
 *
 * It is called on whatever thread has something to say, several at a time, and must not block. Lines that the library
 * would write while the function runs on the same thread are dropped.
 */
typedef void (*kvt_log_fn)(int32_t level,
                           const char *target,
                           size_t target_len,
                           const char *message,
                           size_t message_len,
                           void *user_data);

/**
 * A UTF-8 text of the caller's, read during the call only.
 */
typedef struct kvt_text_t {
  /**
   * First byte. May be NULL if `len` is 0.
   */
  const char *data;
  /**
   * Bytes, without any NUL at the end.
   */
  size_t len;
} kvt_text_t;

/**
 * One buffer: `len / item_len` items of `item_len` bytes, back to back.
 */
typedef struct kvt_entry_t {
  /**
   * Where it starts.
   */
  uint64_t address;
  /**
   * Bytes. With 0 the entry is elided: it keeps its place in the order and has no bytes.
   */
  uint64_t len;
  /**
   * Bytes of one item: for KV, one page of one layer on this rank.
   */
  uint64_t item_len;
  /**
   * The model-wide layer number, or -1 where the pool does not name its layers. All entries of a component or none.
   */
  int64_t layer_id;
  /**
   * `KVT_HOST_MEMORY` or `KVT_CUDA_MEMORY`.
   */
  int32_t memory;
  /**
   * The CUDA device's number; not looked at for host memory.
   */
  int32_t device;
} kvt_entry_t;

/**
 * How one tensor of a "mamba" state is spread over tensor-parallel ranks.
 */
typedef struct kvt_slice_t {
  /**
   * Channels on this rank (SGLang's `state_dim_per_tensor`); 0 where every rank holds the whole tensor.
   */
  uint32_t dim;
  /**
   * Rows in front of the channels (SGLang's `state_slice_outer_counts`), at least 1.
   */
  uint32_t rows;
  /**
   * Channels of the whole model's sub-blocks where each is sharded by itself (SGLang's `state_conv_shard_groups`).
   */
  const uint32_t *groups;
  /**
   * How many; 0 where the channels are one block.
   */
  size_t groups_len;
} kvt_slice_t;

/**
 * Buffers that share one list of item indices.
 */
typedef struct kvt_component_t {
  /**
   * `KVT_COMPONENT_KV`, `KVT_COMPONENT_STATE` or `KVT_COMPONENT_AUX`.
   */
  int32_t kind;
  /**
   * How many of the last entries belong to a speculative draft model (KV only, else 0).
   */
  uint32_t draft_entries;
  /**
   * SGLang's name of a state component, such as "mamba"; empty for the others. The items of "dsa_tail" are the slots
   * of its rings (`item_len` is a row's bytes divided by the ring's size), and its lists are SGLang's six numbers.
   */
  struct kvt_text_t name;
  /**
   * The buffers, in the order both sides agree on.
   */
  const struct kvt_entry_t *entries;
  /**
   * How many.
   */
  size_t entries_len;
  /**
   * For each entry of a "mamba" state, how it is spread. May be left out: then it cannot be re-cut for another
   * tensor-parallel size.
   */
  const struct kvt_slice_t *slices;
  /**
   * How many: `entries_len`, or 0.
   */
  size_t slices_len;
  /**
   * A state's page layout where it is not the layout's own (SGLang's `swa_kv_cache_layout`), else empty.
   */
  struct kvt_text_t page_layout;
} kvt_component_t;

/**
 * What a rank's KV memory looks like. Read during `kvt_engine_new` only.
 */
typedef struct kvt_layout_t {
  /**
   * `KVT_ABI_VERSION`.
   */
  uint32_t abi_version;
  /**
   * Tokens per page.
   */
  uint32_t page_size;
  /**
   * Element type as SGLang spells it, such as "bfloat16".
   */
  struct kvt_text_t kv_dtype;
  /**
   * Page layout, such as "nhd". Only "nhd" can be cut by heads, for unequal tensor parallelism.
   */
  struct kvt_text_t kv_layout;
  /**
   * `KVT_ATTENTION_HEADS` or `KVT_ATTENTION_LATENT`.
   */
  int32_t attention;
  /**
   * KV heads of the whole model; not looked at for a latent cache.
   */
  uint32_t total_kv_heads;
  /**
   * KV heads of this rank, at least 1; not looked at for a latent cache.
   */
  uint32_t rank_kv_heads;
  /**
   * This rank in its attention tensor-parallel group.
   */
  uint32_t tp_rank;
  /**
   * Ranks in that group.
   */
  uint32_t tp_size;
  /**
   * This rank in its pipeline-parallel group.
   */
  uint32_t pp_rank;
  /**
   * Ranks in that group.
   */
  uint32_t pp_size;
  /**
   * First layer held by this rank, draft layers not counted.
   */
  uint32_t first_layer;
  /**
   * One past the last layer held by this rank.
   */
  uint32_t end_layer;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * KV first, then states, then aux.
   */
  const struct kvt_component_t *components;
  /**
   * How many.
   */
  size_t components_len;
  /**
   * DeepSeek-V4: the compression ratio of every layer of the whole model. Buffers grouped by it are paired by layer
   * then. NULL for other models.
   */
  const uint32_t *compression_ratios;
  /**
   * How many.
   */
  size_t compression_ratios_len;
} kvt_layout_t;

/**
 * One ended transfer.
 */
typedef struct kvt_completion_t {
  /**
   * The `user_data` of its request.
   */
  uint64_t user_data;
  /**
   * Its room.
   */
  uint64_t room;
  /**
   * The engine's number for it, as in `kvt_outcome_t`.
   */
  uint64_t id;
} kvt_completion_t;

/**
 * A stretch of this process's memory.
 */
typedef struct kvt_range_t {
  /**
   * Where it starts.
   */
  uint64_t address;
  /**
   * Bytes, not 0.
   */
  uint64_t len;
} kvt_range_t;

/**
 * Some bytes of this process for an address of a peer's.
 */
typedef struct kvt_block_t {
  /**
   * Where to read: inside the buffers of this engine's layout.
   */
  uint64_t source;
  /**
   * Where to write: inside the buffers of the peer's layout.
   */
  uint64_t target;
  /**
   * Bytes; 0 is skipped.
   */
  uint64_t len;
} kvt_block_t;

/**
 * Opens the sending side of a room.
 */
typedef struct kvt_send_request_t {
  /**
   * The rendezvous number (SGLang's `bootstrap_room`), not 0.
   */
  uint64_t room;
  /**
   * The caller's own number, repeated in the completion.
   */
  uint64_t user_data;
  /**
   * How long the whole transfer may take, waiting for grants included.
   */
  uint32_t timeout_ms;
  /**
   * 0.
   */
  uint32_t reserved;
} kvt_send_request_t;

/**
 * One sender that a receiver expects.
 */
typedef struct kvt_source_t {
  /**
   * A connected peer, from `kvt_peer_connect`.
   */
  uint64_t peer;
  /**
   * 1 where the peer only concludes and sends no pages (SGLang's dummy ranks), else 0.
   */
  uint32_t dummy;
  /**
   * 0.
   */
  uint32_t reserved;
} kvt_source_t;

/**
 * Item indices (pages, slots) of one component. The sender's and the receiver's lists pair by position.
 */
typedef struct kvt_items_t {
  /**
   * The indices. May be NULL if `count` is 0.
   */
  const int32_t *items;
  /**
   * How many.
   */
  size_t count;
} kvt_items_t;

/**
 * Opens the receiving side of a room and grants its pages to the senders.
 */
typedef struct kvt_receive_request_t {
  /**
   * The rendezvous number (SGLang's `bootstrap_room`), not 0.
   */
  uint64_t room;
  /**
   * The caller's own number, repeated in the completion.
   */
  uint64_t user_data;
  /**
   * How long the whole transfer may take.
   */
  uint32_t timeout_ms;
  /**
   * How many receivers each sender must wait for, this one included (SGLang's `required_dst_info_num`). At most 65535.
   */
  uint32_t receivers_expected;
  /**
   * Tokens already held, which the sender need not send (SGLang's `decode_prefix_len`).
   */
  uint32_t prefix_tokens;
  /**
   * 0.
   */
  uint32_t reserved;
  /**
   * Who sends.
   */
  const struct kvt_source_t *sources;
  /**
   * How many.
   */
  size_t sources_len;
  /**
   * Target items, one list per component of the layout; lists at the end may be left out.
   */
  const struct kvt_items_t *items;
  /**
   * How many lists.
   */
  size_t items_len;
} kvt_receive_request_t;

/**
 * How a transfer stands, or ended.
 */
typedef struct kvt_outcome_t {
  /**
   * `KVT_WOULD_WAIT` while it is live, `KVT_OK` when every page has arrived, else why it failed.
   */
  kvt_status_t status;
  /**
   * A `KVT_STATE_` number.
   */
  uint32_t state;
  /**
   * Tokens that the receivers already hold; 0 until they have granted their pages.
   */
  uint32_t prefix_tokens;
  /**
   * 1 once every receiver has granted its pages, so that pages may be pushed.
   */
  uint32_t is_ready;
  /**
   * Its room.
   */
  uint64_t room;
  /**
   * The engine's number for it, as in `kvt_completion_t`.
   */
  uint64_t id;
  /**
   * Payload bytes placed or acknowledged; 0 unless it succeeded.
   */
  uint64_t bytes;
  /**
   * Batches they came in.
   */
  uint64_t batches;
  /**
   * From opening to the first batch, in nanoseconds.
   */
  uint64_t waited_ns;
  /**
   * From the first batch to the end, in nanoseconds.
   */
  uint64_t moving_ns;
} kvt_outcome_t;

/**
 * It worked.
 */
#define KVT_OK 0

/**
 * A pointer that must not be NULL is NULL.
 */
#define KVT_NULL_ARGUMENT 100

/**
 * An argument is outside of its range, is no UTF-8 text, or is misaligned.
 */
#define KVT_BAD_ARGUMENT 101

/**
 * The configuration's JSON is malformed, names an unknown field, or has a value outside of its range.
 */
#define KVT_BAD_CONFIG 102

/**
 * The layout contradicts itself.
 */
#define KVT_BAD_LAYOUT 103

/**
 * The room has a live transfer of the same role on this engine.
 */
#define KVT_DUPLICATE_ROOM 104

/**
 * A bounded queue or table is full. Try again when transfers have ended.
 */
#define KVT_QUEUE_FULL 105

/**
 * No such peer is connected (any more).
 */
#define KVT_UNKNOWN_PEER 106

/**
 * The transfer has ended.
 */
#define KVT_ENDED 107

/**
 * Not yet: receivers have not granted their pages, or ranks have not registered. Ask again.
 */
#define KVT_NOT_READY 108

/**
 * The page lists do not fit the layout.
 */
#define KVT_BAD_ITEMS 109

/**
 * The caller was compiled against another version of this header.
 */
#define KVT_WRONG_ABI 111

/**
 * The engine's memory is released; restore it first.
 */
#define KVT_RELEASED 112

/**
 * An address cannot be listened on.
 */
#define KVT_LISTEN 200

/**
 * Memory cannot be used or registered.
 */
#define KVT_REGION 201

/**
 * RDMA is required and cannot be used here.
 */
#define KVT_RDMA 202

/**
 * The system has no thread, descriptor or random number left.
 */
#define KVT_SYSTEM 203

/**
 * A bootstrap registry did not start, or a request to one failed.
 */
#define KVT_BOOTSTRAP 204

/**
 * The telemetry server did not start.
 */
#define KVT_TELEMETRY 205

/**
 * Nobody answers at the address.
 */
#define KVT_UNREACHABLE 300

/**
 * The peer refused, or its layout does not fit.
 */
#define KVT_REFUSED 301

/**
 * The peer does not speak this protocol, or did not finish its greeting in time.
 */
#define KVT_INCOMPATIBLE 302

/**
 * The other side ended the transfer and said why.
 */
#define KVT_PEER_FAILED 303

/**
 * The connection to the peer ended, or the peer stopped answering.
 */
#define KVT_PEER_LOST 304

/**
 * The peer broke the protocol.
 */
#define KVT_PEER_MISBEHAVED 305

/**
 * The deadline passed without any data connection to the peer.
 */
#define KVT_NO_PATH 306

/**
 * Cancelled by this side.
 */
#define KVT_CANCELLED 400

/**
 * This side's deadline passed.
 */
#define KVT_TIMEOUT 401

/**
 * Memory of either side could not be accessed.
 */
#define KVT_MEMORY 402

/**
 * The time given to wait passed; what was waited for goes on.
 */
#define KVT_WOULD_WAIT 403

/**
 * A write by address failed, and the peer has not confirmed that it stopped: its memory may still be written.
 */
#define KVT_UNSETTLED 404

/**
 * The engine has shut down.
 */
#define KVT_SHUTDOWN 900

/**
 * The library panicked in this or an earlier call on the same handle, which can only be freed now. Please report it.
 */
#define KVT_PANIC 901

/**
 * A failure that this version has no code for; `kvt_last_error()` says what it was.
 */
#define KVT_OTHER 902

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * The ABI version of the loaded library: `KVT_ABI_VERSION` of the header it was built with.
 *
 * Threads: any, at any time. Errors: none.
 */
uint32_t kvt_abi_version(void);

/**
 * The version of the loaded library, such as "0.1.0".
 *
 * Ownership: the text is the library's and lives as long as it is loaded. Threads: any, at any time. Errors: none.
 */
const char *kvt_version(void);

/**
 * Name and meaning of a status, such as "KVT_TIMEOUT: this side's deadline passed". The part before the colon is stable.
 * An unknown code gives "unknown status".
 *
 * Ownership: the text is the library's and lives as long as it is loaded. Threads: any, at any time. Errors: none.
 */
const char *kvt_status_text(kvt_status_t status);

/**
 * The calling thread's last failure as one sentence, with the values that were wrong and what to do; "" before the
 * first. A call that succeeds leaves it as it was.
 *
 * Ownership: the text is the library's and lives until the next failure on this thread, or the thread's end.
 * Threads: any; each thread sees its own. Errors: none.
 */
const char *kvt_last_error(void);

/**
 * Frees a text that this library gave through an `out_text` or `out_reason` argument. NULL is nothing to do.
 *
 * Ownership: the text is gone. Threads: any. Errors: none.
 *
 * # Safety
 * `text` is NULL or came from this library and was not freed before.
 */
void kvt_text_free(char *text);

/**
 * Hands lines up to `level` (a `KVT_LOG_` number) to `sink` from now on, instead of to an earlier one. NULL ends it.
 * Without a sink nothing is formatted. The log is the process's, not an engine's.
 *
 * When this returns no thread is in the earlier sink any more, so its `user_data` may be freed.
 *
 * Ownership: `user_data` is the caller's and must live until another call replaces the sink. Threads: any, but not from
 * within a sink. Errors: `KVT_BAD_ARGUMENT` (level, or called within a sink), `KVT_SYSTEM` (the process has another
 * subscriber for this library's log).
 *
 * # Safety
 * `sink` may be called from any thread with `user_data` until it is replaced.
 */
kvt_status_t kvt_log(int32_t level,
                     kvt_log_fn sink,
                     void *user_data);

/**
 * Starts an engine over the caller's memory and, where the configuration says so, its listeners.
 *
 * `config` is a JSON object, or empty for the defaults: every field of the library's `EngineConfig` by its name, times
 * with their unit at the end. `{"listen": "0.0.0.0:0", "same_host": "auto"}` is a usual one; section "Configuration" of
 * ffi/README.md has them all. An unknown field is refused by name.
 *
 * Ownership: `config` and `layout` are read during the call only. `*out_engine` is the caller's, to be given back with
 * `kvt_engine_free`. The buffers that the layout names stay the caller's; they must stay readable and writable, from any
 * thread, until `kvt_engine_free` has returned. Overlapping buffers are registered once.
 * Threads: any. Errors: `KVT_WRONG_ABI`, `KVT_BAD_CONFIG`, `KVT_BAD_LAYOUT`, `KVT_BAD_ARGUMENT`, `KVT_REGION` (memory that
 * cannot be used), `KVT_RDMA` (required, but not usable here), `KVT_LISTEN`, `KVT_BOOTSTRAP`, `KVT_TELEMETRY`,
 * `KVT_SYSTEM`. `*out_engine` is untouched then.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right; the buffers live as said above.
 */
kvt_status_t kvt_engine_new(const char *config,
                            size_t config_len,
                            const struct kvt_layout_t *layout,
                            struct kvt_engine_t **out_engine);

/**
 * Ends every live transfer with `KVT_SHUTDOWN`, closes every connection, joins the engine's threads (3 s at most) and
 * frees the engine. When this returns nothing of the engine touches the buffers any more. NULL is nothing to do.
 *
 * Ownership: the engine is gone. Handles of its transfers stay valid and must still be freed; they say `KVT_SHUTDOWN`.
 * Threads: any, but no other call with this engine may be running or follow. Errors: none.
 *
 * # Safety
 * `engine` is NULL or came from `kvt_engine_new` and was not freed before.
 */
void kvt_engine_free(struct kvt_engine_t *engine);

/**
 * What the engine is and does at this moment, as a JSON object: `version`, `instance`, the addresses `listen`,
 * `bootstrap`, `telemetry` and `metrics` (null where there is none), `layout`, `regions`, `rdma` (what each device was
 * asked to do), `peers` with the `path` to each and why better ones were refused (`path_reason`), `counters`, and the live
 * picture: `rails`, `rooms`, `failures`.
 *
 * Ownership: `*out_text` is the caller's, to be given back with `kvt_text_free`. `out_len` may be NULL.
 * Threads: any. Errors: `KVT_NULL_ARGUMENT`.
 *
 * # Safety
 * `engine` is NULL or alive; the places are NULL or writable.
 */
kvt_status_t kvt_engine_info_json(const struct kvt_engine_t *engine,
                                  char **out_text,
                                  size_t *out_len);

/**
 * A descriptor (an eventfd) that is readable while ended transfers wait for `kvt_completions_drain`. For `poll`,
 * `epoll` or an event loop; do not read or close it.
 *
 * Ownership: the descriptor is the engine's and is closed by `kvt_engine_free`.
 * Threads: any. Errors: `KVT_NULL_ARGUMENT`, `KVT_SYSTEM` (the process had no descriptor left when the engine started).
 *
 * # Safety
 * `engine` is NULL or alive; `out_fd` is NULL or writable.
 */
kvt_status_t kvt_completions_fd(const struct kvt_engine_t *engine,
                                int32_t *out_fd);

/**
 * Takes transfers that ended, oldest first, at most `capacity` of them; `*out_count` says how many. While more are left
 * the descriptor stays readable. A transfer that was freed is not reported. Never waits.
 *
 * Ownership: `out_completions` is the caller's, for `capacity` values. Threads: any; each completion goes to one caller.
 * Errors: `KVT_NULL_ARGUMENT`, `KVT_BAD_ARGUMENT`.
 *
 * # Safety
 * `engine` is NULL or alive; `out_completions` is NULL or writable for `capacity` values, `out_count` NULL or writable.
 */
kvt_status_t kvt_completions_drain(const struct kvt_engine_t *engine,
                                   struct kvt_completion_t *out_completions,
                                   size_t capacity,
                                   size_t *out_count);

/**
 * Gives up buffers, so that the caller may free the memory behind them (SGLang does while it takes new weights). No
 * transfer opens from now on (`KVT_RELEASED`); live ones are waited for. With RDMA the registrations are undone, for which
 * peers are disconnected.
 *
 * A range stands for every buffer that it touches, and for those that overlap them; no range at all stands for all
 * buffers. Buffers that are released stay so.
 *
 * Ownership: `ranges` is read during the call only. The memory must not be freed before this has returned `KVT_OK`.
 * Threads: any; waits up to `timeout_ms`, and with RDMA some 100 ms more. Errors: `KVT_WOULD_WAIT` (transfers went on;
 * nothing was released), `KVT_RDMA` (still registered; try again), `KVT_BAD_ARGUMENT` (no buffer there),
 * `KVT_SHUTDOWN`.
 *
 * # Safety
 * `engine` is NULL or alive; `ranges` is NULL or as long as it says.
 */
kvt_status_t kvt_engine_release_memory(const struct kvt_engine_t *engine,
                                       const struct kvt_range_t *ranges,
                                       size_t ranges_len,
                                       uint32_t timeout_ms);

/**
 * Takes buffers back into use, at their old addresses. Peers that were disconnected must be connected again.
 *
 * Ownership: `ranges` is read during the call only; from now on the memory must stay usable again until
 * `kvt_engine_free` or another release. Threads: any; registering may take seconds. Errors: `KVT_RDMA` (it stays
 * released), `KVT_BAD_ARGUMENT` (no buffer there), `KVT_SHUTDOWN`.
 *
 * # Safety
 * `engine` is NULL or alive; `ranges` is NULL or as long as it says; memory is behind the buffers again.
 */
kvt_status_t kvt_engine_restore_memory(const struct kvt_engine_t *engine,
                                       const struct kvt_range_t *ranges,
                                       size_t ranges_len);

/**
 * Writes blocks to addresses of a peer whose configuration says `writable_by_address`, and waits until the peer has
 * confirmed the last byte. Blocks that touch are merged. The order of blocks, and of calls, is not kept.
 *
 * `KVT_OK` means that every byte is there. Any other status but `KVT_UNSETTLED` means that none is missing that could
 * still come: nothing will be written any more.
 *
 * Ownership: `blocks` is read during the call only. Threads: any, several at a time; waits up to `timeout_ms`, and 1 s
 * more for the peer to confirm that a failed write is over. Errors: `KVT_UNSETTLED` (the peer does not answer, so its
 * memory may still be written), `KVT_BAD_ITEMS` (an address outside of the buffers, or the peer does not allow it),
 * `KVT_UNKNOWN_PEER`, `KVT_TIMEOUT`, `KVT_PEER_FAILED`, `KVT_PEER_LOST`, `KVT_RELEASED`, `KVT_SHUTDOWN`.
 *
 * # Safety
 * `engine` is NULL or alive; `blocks` is NULL or as long as it says.
 */
kvt_status_t kvt_engine_write(const struct kvt_engine_t *engine,
                              uint64_t peer,
                              const struct kvt_block_t *blocks,
                              size_t blocks_len,
                              uint32_t timeout_ms);

/**
 * Connects to the listener of another engine, compares both layouts and opens the data connections.
 *
 * Several connections to one engine may exist; each has its own number. The path that was chosen, and why not a better
 * one, is in `kvt_engine_info_json`.
 *
 * Ownership: `address` ("host:port" or "[v6]:port") is read during the call only. `*out_peer` is a number, never used
 * twice; the connection lives until `kvt_peer_disconnect`, its loss, or the engine's end.
 * Threads: any; waits up to `timeout_ms`. Errors: `KVT_UNREACHABLE`, `KVT_REFUSED` (with the sentence that says why the
 * layouts do not fit), `KVT_INCOMPATIBLE`, `KVT_QUEUE_FULL` (peers_max), `KVT_SHUTDOWN`, `KVT_BAD_ARGUMENT`.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right.
 */
kvt_status_t kvt_peer_connect(const struct kvt_engine_t *engine,
                              const char *address,
                              size_t address_len,
                              uint32_t timeout_ms,
                              uint64_t *out_peer);

/**
 * Ends the connection to a peer. Transfers that need it fail with `reason` (which may be empty) on both sides.
 *
 * Ownership: `reason` is read during the call only. Threads: any. Errors: `KVT_UNKNOWN_PEER` (it is gone already),
 * `KVT_BAD_ARGUMENT`.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right.
 */
kvt_status_t kvt_peer_disconnect(const struct kvt_engine_t *engine,
                                 uint64_t peer,
                                 const char *reason,
                                 size_t reason_len);

/**
 * Asks a peer whether it answers, and waits for that. A frozen process does not answer, although its connections stand.
 *
 * Ownership: `*out_round_trip_ns`, which may be NULL, is how long the answer took. Threads: any; waits up to
 * `timeout_ms`. Errors: `KVT_PEER_LOST` (no answer in time; it stays connected until it has been silent for
 * `peer_silence_max_ms`), `KVT_UNKNOWN_PEER`.
 *
 * # Safety
 * `engine` is NULL or alive; `out_round_trip_ns` is NULL or writable.
 */
kvt_status_t kvt_peer_probe(const struct kvt_engine_t *engine,
                            uint64_t peer,
                            uint32_t timeout_ms,
                            uint64_t *out_round_trip_ns);

/**
 * Opens the sending side of a room. It becomes ready when every receiver has granted its pages.
 *
 * Ownership: `request` is read during the call only. `*out_transfer` is the caller's, to be given back with
 * `kvt_transfer_free`. Threads: any; never waits. Errors: `KVT_DUPLICATE_ROOM`, `KVT_QUEUE_FULL`, `KVT_SHUTDOWN`,
 * `KVT_BAD_ARGUMENT`. `*out_transfer` is untouched then.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to.
 */
kvt_status_t kvt_send_open(const struct kvt_engine_t *engine,
                           const struct kvt_send_request_t *request,
                           struct kvt_transfer_t **out_transfer);

/**
 * Opens the receiving side of a room and tells its senders where their pages go. From now on until the end they may
 * write to those pages.
 *
 * Ownership: `request` and its lists are read during the call only. `*out_transfer` is the caller's, to be given back
 * with `kvt_transfer_free`. Threads: any; never waits. Errors: `KVT_DUPLICATE_ROOM`, `KVT_QUEUE_FULL`,
 * `KVT_UNKNOWN_PEER`, `KVT_BAD_ITEMS`, `KVT_SHUTDOWN`, `KVT_BAD_ARGUMENT`. `*out_transfer` is untouched then.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right.
 */
kvt_status_t kvt_receive_open(const struct kvt_engine_t *engine,
                              const struct kvt_receive_request_t *request,
                              struct kvt_transfer_t **out_transfer);

/**
 * Queues pages to every receiver: `items[c]` are indices in component `c` of the layout; successive chunks follow each
 * other. With `KVT_LAST` in `flags` no chunk follows; that one may be empty. Small chunks are written by the calling
 * thread if the connection is free.
 *
 * Ownership: the lists are copied; the pages themselves must not change until the end. Threads: any; never waits, but
 * chunks of one transfer are ordered by their calls. Errors: `KVT_NOT_READY`, `KVT_BAD_ITEMS`, `KVT_QUEUE_FULL` (try
 * again), `KVT_ENDED`, `KVT_SHUTDOWN`, `KVT_BAD_ARGUMENT`. Nothing is queued then.
 *
 * # Safety
 * `transfer` is NULL or alive; the lists are as long as they say.
 */
kvt_status_t kvt_transfer_push(const struct kvt_transfer_t *transfer,
                               const struct kvt_items_t *items,
                               size_t items_len,
                               uint32_t flags);

/**
 * Queues pages that the device still writes: not a byte of them is read before each of the `events` has happened. They are
 * events of the device's driver as integers (`CUevent`, `cudaEvent_t`; `torch.cuda.Event.cuda_event`), recorded before
 * this call. Otherwise as `kvt_transfer_push`, which is what it is without events. Chunks pushed later wait behind this
 * one; what would be refused by the time the events have happened ends the transfer instead.
 *
 * Ownership: the lists are copied; an event may be recorded anew or destroyed when this returns; the pages themselves must
 * not change from the events to the end. Threads: any; never waits, neither for the network nor for the device. Errors:
 * those of `kvt_transfer_push`; `KVT_BAD_ITEMS` also for events of an engine without device memory, unknown ones, and more
 * than 64. Nothing is queued then.
 *
 * # Safety
 * `transfer` is NULL or alive; the lists are as long as they say; the events are alive during the call.
 */
kvt_status_t kvt_transfer_push_after(const struct kvt_transfer_t *transfer,
                                     const struct kvt_items_t *items,
                                     size_t items_len,
                                     uint32_t flags,
                                     const uint64_t *events,
                                     size_t events_len);

/**
 * The states of many transfers, of any engines, in one call: `out_states[i]` is a `KVT_STATE_` number.
 *
 * Ownership: `out_states` is the caller's, for `len` values. Threads: any; never waits. Errors: `KVT_NULL_ARGUMENT`
 * (also for a NULL among the transfers), `KVT_PANIC`. `out_states` is undefined then.
 *
 * # Safety
 * `transfers` is NULL or points to `len` transfers that are NULL or alive; `out_states` is NULL or writable for `len`
 * values.
 */
kvt_status_t kvt_transfer_poll_many(const struct kvt_transfer_t *const *transfers,
                                    size_t len,
                                    uint8_t *out_states);

/**
 * Waits for readiness (`KVT_UNTIL_READY`) or the end (`KVT_UNTIL_ENDED`), up to `timeout_ms`; 0 only looks. Either way
 * `*out_outcome` says how the transfer stands, and `*out_reason`, if it failed, the sentence that says why.
 *
 * Once this has shown the end, nothing of the transfer touches memory any more.
 *
 * Ownership: `*out_reason` is the caller's, to be given back with `kvt_text_free`; it is NULL unless the transfer failed.
 * Both places may be NULL. Threads: any. Errors: `KVT_WOULD_WAIT` (the time passed; the transfer goes on),
 * `KVT_BAD_ARGUMENT`. A failed transfer is no error of this call: `out_outcome->status` says it.
 *
 * # Safety
 * `transfer` is NULL or alive; the places are NULL or writable.
 */
kvt_status_t kvt_transfer_wait(const struct kvt_transfer_t *transfer,
                               int32_t until,
                               uint32_t timeout_ms,
                               struct kvt_outcome_t *out_outcome,
                               char **out_reason);

/**
 * Ends a transfer and tells the other side why at once: `reason` is in the text of its `KVT_PEER_FAILED`. With an empty
 * reason it hears "cancelled by the application". A transfer that has ended stays as it is.
 *
 * Nothing more is handed to a network, but a network card may still touch this side's pages: they are free when
 * `kvt_transfer_wait`, `kvt_transfer_fence` or `kvt_transfer_poll_many` shows the end, which without RDMA is at once.
 *
 * Ownership: `reason` is read during the call only. Threads: any; does not wait. Errors: `KVT_BAD_ARGUMENT`.
 *
 * # Safety
 * `transfer` is NULL or alive; `reason` is NULL or as long as it says.
 */
kvt_status_t kvt_transfer_cancel(const struct kvt_transfer_t *transfer,
                                 const char *reason,
                                 size_t reason_len);

/**
 * Ends a transfer as `kvt_transfer_cancel` does, without a reason, and waits until nothing of it can touch this side's
 * memory any more: with RDMA some 10 ms, else at once. A transfer that has ended is fenced already.
 *
 * Ownership: nothing changes hands. Threads: any; waits up to `timeout_ms`. Errors: `KVT_WOULD_WAIT` (the time passed;
 * the memory may still be touched, fence again).
 *
 * # Safety
 * `transfer` is NULL or alive.
 */
kvt_status_t kvt_transfer_fence(const struct kvt_transfer_t *transfer,
                                uint32_t timeout_ms);

/**
 * Gives a transfer back. One that is still live is cancelled first, as by `kvt_transfer_cancel`; a completion of it
 * that nobody drained is dropped. NULL is nothing to do.
 *
 * Ownership: the transfer is gone. Threads: any, but no other call with this transfer may be running or follow. It may
 * be freed before or after its engine. Errors: none.
 *
 * # Safety
 * `transfer` is NULL or came from an open call and was not freed before.
 */
void kvt_transfer_free(struct kvt_transfer_t *transfer);

/**
 * Starts a bootstrap registry on a thread of its own; it accepts connections when this returns.
 *
 * `config` is a JSON object, or empty for the defaults (127.0.0.1:8998): section "Bootstrap" of ffi/README.md has its
 * fields. With port 0 the system picks one.
 *
 * Ownership: `config` is read during the call only. `*out_bootstrap` is the caller's, to be given back with
 * `kvt_bootstrap_free`. `*out_port`, which may be NULL, is the port it listens on.
 * Threads: any. Errors: `KVT_BAD_CONFIG`, `KVT_LISTEN`, `KVT_SYSTEM`, `KVT_BAD_ARGUMENT`.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right.
 */
kvt_status_t kvt_bootstrap_new(const char *config,
                               size_t config_len,
                               struct kvt_bootstrap_t **out_bootstrap,
                               uint16_t *out_port);

/**
 * Stops a registry, drops its connections and joins its thread (1 s at most). NULL is nothing to do.
 *
 * Ownership: the registry is gone. Threads: any, once. Errors: none.
 *
 * # Safety
 * `bootstrap` is NULL or came from `kvt_bootstrap_new` and was not freed before.
 */
void kvt_bootstrap_free(struct kvt_bootstrap_t *bootstrap);

/**
 * Makes one request to a bootstrap registry, ours or stock SGLang's, and waits for the answer.
 *
 * `request` is a JSON object: `address` ("host:port"), optionally `token`, `ca` (a PEM file: speak HTTPS) and
 * `timeout_ms` (5000), and the `call`:
 * - `"health"` → `{}`
 * - `"server_info"` → `{"value": {...}, "generation": 1, "instance": "..."}`, the fields of SGLang's server info
 * - `{"rank": {"dp": 0, "cp": 0, "tp": 0, "pp": 0}}` → `{"value": {"rank_ip": "...", "rank_port": 1}, ...}`
 * - `{"register": {"row": {...}, "lease_s": 60, "instance": "...", "deadline_ms": 30000}}` → `{}`; the row has SGLang's
 *   field names; the last three may be left out
 * - `{"withdraw": {"row": {...}}}` → `{}`
 * - `{"register_dp_rank": {"room": 1, "dp_rank": 0}}` → `{}`
 * - `{"query_dp_ranks": {"rooms": [1, 2]}}` → `{"1": 0}`, unknown rooms left out
 *
 * Ownership: `request` is read during the call only. `*out_text` is the caller's, to be given back with `kvt_text_free`.
 * `out_len` may be NULL. Threads: any; waits up to the time-out (`register`: up to its deadline, with several attempts).
 * Errors: `KVT_NOT_READY` (not all ranks have registered; ask again), `KVT_BOOTSTRAP`, `KVT_BAD_CONFIG` (the request),
 * `KVT_BAD_ARGUMENT`.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right.
 */
kvt_status_t kvt_bootstrap_call(const char *request,
                                size_t request_len,
                                char **out_text,
                                size_t *out_len);

/**
 * Looks at this host for what RDMA needs and says what is wrong and how to put it right: the JSON that
 * `kvtransfer doctor --json` prints. `findings` has the sentences, each with its `level` and `fix`.
 *
 * `options` is a JSON object, or empty: `devices` (devices that must be usable, as SGLang's
 * `--disaggregation-ib-device`), `peer` ("host:port" of a `kvtransfer doctor --serve` on another host: compares both
 * and measures the path), `root` (look at the host below this directory instead).
 *
 * Ownership: `options` is read during the call only. `*out_text` is the caller's, to be given back with `kvt_text_free`.
 * `out_len` may be NULL. Threads: any; opens the host's RDMA devices with small queue pairs, which takes some 100 ms, and
 * seconds with a peer. Errors: `KVT_BAD_CONFIG`, `KVT_UNREACHABLE` (the peer), `KVT_BAD_ARGUMENT`. A host that lacks
 * something is no error of this call.
 *
 * # Safety
 * Every pointer is NULL or valid for what it points to; lengths are right.
 */
kvt_status_t kvt_doctor_json(const char *options,
                             size_t options_len,
                             char **out_text,
                             size_t *out_len);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* KVTRANSFER_H */
