// A C++ client in one process: two engines, many rooms, an event loop, the log, a registry.
#include <poll.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "check.h"

namespace {

struct FreeEngine {
  void operator()(kvt_engine_t *engine) const { kvt_engine_free(engine); }
};
struct FreeTransfer {
  void operator()(kvt_transfer_t *transfer) const { kvt_transfer_free(transfer); }
};
struct FreeBootstrap {
  void operator()(kvt_bootstrap_t *registry) const { kvt_bootstrap_free(registry); }
};
using Engine = std::unique_ptr<kvt_engine_t, FreeEngine>;
using Transfer = std::unique_ptr<kvt_transfer_t, FreeTransfer>;
using Bootstrap = std::unique_ptr<kvt_bootstrap_t, FreeBootstrap>;

Engine engine_over(const world_t &world, const std::string &config) {
  kvt_engine_t *engine = nullptr;
  EXPECT(KVT_OK, start(&world, config.c_str(), &engine));
  return Engine(engine);
}

Transfer send(const Engine &engine, uint64_t room) {
  kvt_transfer_t *transfer = nullptr;
  kvt_send_request_t request = to_send(room, 20000);
  EXPECT(KVT_OK, kvt_send_open(engine.get(), &request, &transfer));
  return Transfer(transfer);
}

Transfer receive(const Engine &engine, uint64_t peer, uint64_t room, int32_t page) {
  kvt_transfer_t *transfer = nullptr;
  kvt_source_t source = {peer, 0, 0};
  kvt_items_t items = {&page, 1};
  kvt_receive_request_t request = to_receive(room, &source, &items, 1);
  request.prefix_tokens = 32;
  EXPECT(KVT_OK, kvt_receive_open(engine.get(), &request, &transfer));
  return Transfer(transfer);
}

// Waits on the descriptor and takes completions, a few at a time, until `wanted` have come.
std::map<uint64_t, kvt_completion_t> completed(const Engine &engine, size_t wanted) {
  std::map<uint64_t, kvt_completion_t> seen;
  int32_t fd = -1;
  EXPECT(KVT_OK, kvt_completions_fd(engine.get(), &fd));
  while (seen.size() < wanted) {
    pollfd watched = {fd, POLLIN, 0};
    CHECK(poll(&watched, 1, 20000) == 1);
    kvt_completion_t some[3];
    size_t count = 99;
    EXPECT(KVT_OK, kvt_completions_drain(engine.get(), some, 3, &count));
    CHECK(count <= 3);
    for (size_t i = 0; i < count; i++) CHECK(seen.emplace(some[i].room, some[i]).second);
  }
  pollfd watched = {fd, POLLIN, 0};
  CHECK(poll(&watched, 1, 0) == 0);
  return seen;
}

void many_rooms(const std::string &same_host) {
  constexpr uint64_t ROOMS = 20;
  static world_t source, target;
  describe(&source);
  describe(&target);
  for (int i = 0; i < PAGES * PAGE_BYTES; i++) source.pages[i] = static_cast<unsigned char>(i * 7 + i / PAGE_BYTES);
  {
    Engine prefill = engine_over(source, "{\"listen\": \"127.0.0.1:0\"," + same_host + "}");
    Engine decode = engine_over(target, "{" + same_host + "}");
    uint64_t peer = connect_to(decode.get(), prefill.get());
    std::vector<Transfer> sends, receives;
    std::vector<const kvt_transfer_t *> all;
    for (uint64_t room = 1; room <= ROOMS; room++) {
      sends.push_back(send(prefill, room));
      receives.push_back(receive(decode, peer, room, static_cast<int32_t>(PAGES - room)));
      all.push_back(sends.back().get());
      all.push_back(receives.back().get());
    }
    // Several threads, each with transfers of its own.
    std::vector<std::thread> threads;
    for (uint64_t first = 0; first < ROOMS; first += 5) {
      threads.emplace_back([&sends, first] {
        for (uint64_t at = first; at < first + 5; at++) {
          kvt_outcome_t outcome;
          EXPECT(KVT_OK, kvt_transfer_wait(sends[at].get(), KVT_UNTIL_READY, 20000, &outcome, nullptr));
          CHECK(outcome.is_ready == 1 && outcome.prefix_tokens == 32);
          int32_t page = static_cast<int32_t>(at);
          kvt_items_t items = {&page, 1};
          EXPECT(KVT_OK, kvt_transfer_push(sends[at].get(), &items, 1, KVT_LAST));
        }
      });
    }
    for (std::thread &thread : threads) thread.join();
    auto received = completed(decode, ROOMS);
    for (auto &[room, completion] : received) CHECK(completion.user_data == room + 2000);
    auto sent = completed(prefill, ROOMS);
    for (auto &[room, completion] : sent) CHECK(completion.user_data == room + 1000);
    std::vector<uint8_t> states(all.size(), 9);
    EXPECT(KVT_OK, kvt_transfer_poll_many(all.data(), all.size(), states.data()));
    for (uint8_t state : states) CHECK(state == KVT_STATE_SUCCESS);
    for (uint64_t room = 1; room <= ROOMS; room++) {
      ends(receives[room - 1].get(), KVT_OK, nullptr);
      CHECK(memcmp(target.pages + (PAGES - room) * PAGE_BYTES, source.pages + (room - 1) * PAGE_BYTES, PAGE_BYTES) == 0);
    }
  }
  free(source.pages);
  free(target.pages);
}

void reasons_reach_the_other_side() {
  static world_t source, target;
  describe(&source);
  describe(&target);
  {
    Engine prefill = engine_over(source, "{\"listen\": \"127.0.0.1:0\"}");
    Engine decode = engine_over(target, "");
    uint64_t peer = connect_to(decode.get(), prefill.get());
    Transfer sending = send(prefill, 1);
    Transfer receiving = receive(decode, peer, 1, 3);
    EXPECT(KVT_OK, kvt_transfer_wait(sending.get(), KVT_UNTIL_READY, 20000, nullptr, nullptr));
    const std::string why = "the prompt was too long: 9000 tokens";
    EXPECT(KVT_OK, kvt_transfer_cancel(sending.get(), why.data(), why.size()));
    ends(receiving.get(), KVT_PEER_FAILED, why.c_str());
    ends(sending.get(), KVT_CANCELLED, why.c_str());
    // The other way round, by a fence, whose end frees the pages.
    sending = send(prefill, 2);
    receiving = receive(decode, peer, 2, 3);
    EXPECT(KVT_OK, kvt_transfer_wait(sending.get(), KVT_UNTIL_READY, 20000, nullptr, nullptr));
    EXPECT(KVT_OK, kvt_transfer_fence(receiving.get(), 20000));
    ends(receiving.get(), KVT_CANCELLED, "cancelled");
    ends(sending.get(), KVT_PEER_FAILED, "cancelled");
    // A freed transfer is cancelled and not reported; that of room 1 was freed before anybody asked.
    CHECK(completed(decode, 1).count(2) == 1);
    receiving = receive(decode, peer, 3, 3);
    receiving.reset();
    size_t count = 9;
    kvt_completion_t completion;
    EXPECT(KVT_OK, kvt_completions_drain(decode.get(), &completion, 1, &count));
    CHECK(count == 0);
  }
  free(source.pages);
  free(target.pages);
}

struct Lines {
  std::mutex lock;
  std::vector<std::string> lines;
  std::atomic<int> nested{0};
};

extern "C" void take(int32_t level, const char *target, size_t target_len, const char *message, size_t message_len,
                     void *user_data) {
  auto *lines = static_cast<Lines *>(user_data);
  // From within a sink the log stays as it is.
  if (kvt_log(KVT_LOG_INFO, nullptr, nullptr) == KVT_BAD_ARGUMENT) lines->nested++;
  std::lock_guard<std::mutex> held(lines->lock);
  lines->lines.push_back(std::to_string(level) + " " + std::string(target, target_len) + ": " +
                         std::string(message, message_len));
}

void the_log_goes_to_one_sink() {
  Lines lines;
  EXPECT(KVT_OK, kvt_log(KVT_LOG_INFO, take, &lines));
  const std::string config = "{\"listen\": \"127.0.0.1:0\"}";
  auto registry = [&config] {
    kvt_bootstrap_t *started = nullptr;
    EXPECT(KVT_OK, kvt_bootstrap_new(config.data(), config.size(), &started, nullptr));
    return Bootstrap(started);
  };
  registry();
  EXPECT(KVT_OK, kvt_log(KVT_LOG_ERROR, nullptr, nullptr));
  size_t before = lines.lines.size();
  bool found = false;
  for (const std::string &line : lines.lines)
    found = found || (line.rfind("3 kvtransfer::serve::bootstrap: the bootstrap registry listens local_addr=127.0.0.1:", 0) == 0);
  CHECK(found && lines.nested.load() == static_cast<int>(before));
  registry();
  CHECK(lines.lines.size() == before);
}

std::string ask(uint16_t port, const std::string &call) {
  const std::string request = "{\"address\": \"127.0.0.1:" + std::to_string(port) + "\", \"call\": " + call + "}";
  char *text = nullptr;
  size_t len = 0;
  EXPECT(KVT_OK, kvt_bootstrap_call(request.data(), request.size(), &text, &len));
  std::string answer(text, len);
  kvt_text_free(text);
  return answer;
}

void a_registry_answers() {
  kvt_bootstrap_t *started = nullptr;
  uint16_t port = 0;
  const std::string config = "{\"listen\": \"127.0.0.1:0\", \"probe_interval_ms\": 0}";
  EXPECT(KVT_OK, kvt_bootstrap_new(config.data(), config.size(), &started, &port));
  Bootstrap registry(started);
  CHECK(ask(port, "\"health\"") == "{}");
  const std::string row = "{\"row\": {\"rank_ip\": \"10.0.0.1\", \"rank_port\": 700, \"page_size\": 16, \"kv_cache_dtype\": \"bfloat16\"}";
  CHECK(ask(port, "{\"register\": " + row + ", \"lease_s\": 60, \"instance\": \"one\"}}") == "{}");
  const std::string info = ask(port, "\"server_info\"");
  CHECK(info.find("\"attn_tp_size\":1") != std::string::npos && info.find("\"instance\":\"one\"") != std::string::npos);
  const std::string rank = ask(port, "{\"rank\": {\"dp\": 0, \"cp\": 0, \"tp\": 0, \"pp\": 0}}");
  CHECK(rank.find("\"rank_ip\":\"10.0.0.1\"") != std::string::npos && rank.find("\"rank_port\":700") != std::string::npos);
  CHECK(ask(port, "{\"register_dp_rank\": {\"room\": 12, \"dp_rank\": 3}}") == "{}");
  CHECK(ask(port, "{\"query_dp_ranks\": {\"rooms\": [11, 12]}}") == "{\"12\":3}");
  CHECK(ask(port, "{\"withdraw\": " + row + "}}") == "{}");
}

void reports_are_json() {
  static world_t world;
  describe(&world);
  {
    Engine engine = engine_over(world, "{\"listen\": \"127.0.0.1:0\", \"telemetry\": {}, \"bootstrap\": {\"listen\": \"127.0.0.1:0\"}}");
    char *text = nullptr;
    size_t len = 0;
    EXPECT(KVT_OK, kvt_engine_info_json(engine.get(), &text, &len));
    const std::string info(text);
    CHECK(info.size() == len);
    for (const char *part : {"\"instance\":\"", "\"telemetry\":\"127.0.0.1:", "\"bootstrap\":\"127.0.0.1:",
                             "\"metrics\":null", "\"kv_dtype\":\"bfloat16\"", "\"regions\":[{"})
      CHECK(info.find(part) != std::string::npos);
    kvt_text_free(text);
  }
  char *report = nullptr;
  const std::string options = "{\"root\": \"/nowhere\"}";
  EXPECT(KVT_OK, kvt_doctor_json(options.data(), options.size(), &report, nullptr));
  CHECK(strstr(report, "\"findings\"") != nullptr);
  kvt_text_free(report);
  free(world.pages);
}

// Memory that goes away and comes back, between two requests.
void memory_is_released_and_restored() {
  static world_t source, target;
  describe(&source);
  describe(&target);
  memset(source.pages, 7, PAGES * PAGE_BYTES);
  {
    Engine prefill = engine_over(source, "{\"listen\": \"127.0.0.1:0\"}");
    Engine decode = engine_over(target, "");
    uint64_t peer = connect_to(decode.get(), prefill.get());
    kvt_range_t pages = {target.entries[0].address + 10, 20};
    kvt_range_t elsewhere = {64, 16};
    FAILS(KVT_BAD_ARGUMENT, "no buffer", kvt_engine_release_memory(decode.get(), &elsewhere, 1, 1000));
    Transfer live = receive(decode, peer, 1, 3);
    FAILS(KVT_WOULD_WAIT, "1 transfers still use the memory", kvt_engine_release_memory(decode.get(), &pages, 1, 10));
    EXPECT(KVT_OK, kvt_transfer_fence(live.get(), 20000));
    EXPECT(KVT_OK, kvt_engine_release_memory(decode.get(), &pages, 1, 20000));
    kvt_send_request_t request = to_send(2, 1000);
    kvt_transfer_t *refused = nullptr;
    FAILS(KVT_RELEASED, "released", kvt_send_open(decode.get(), &request, &refused));
    EXPECT(KVT_OK, kvt_engine_restore_memory(decode.get(), &pages, 1));
    Transfer sending = send(prefill, 3);
    Transfer receiving = receive(decode, peer, 3, 5);
    EXPECT(KVT_OK, kvt_transfer_wait(sending.get(), KVT_UNTIL_READY, 20000, nullptr, nullptr));
    int32_t page = 9;
    kvt_items_t items = {&page, 1};
    uint64_t event = 4096;
    FAILS(KVT_BAD_ITEMS, "memory is the host's", kvt_transfer_push_after(sending.get(), &items, 1, KVT_LAST, &event, 1));
    EXPECT(KVT_OK, kvt_transfer_push_after(sending.get(), &items, 1, KVT_LAST, nullptr, 0));
    ends(receiving.get(), KVT_OK, nullptr);
    CHECK(target.pages[5 * PAGE_BYTES] == 7 && target.pages[6 * PAGE_BYTES] == 0);
    // Without a range it is all of it.
    EXPECT(KVT_OK, kvt_engine_release_memory(prefill.get(), nullptr, 0, 20000));
    EXPECT(KVT_OK, kvt_engine_restore_memory(prefill.get(), nullptr, 0));
  }
  free(source.pages);
  free(target.pages);
}

// Ranks without a layout, one of which writes to addresses of the other.
void blocks_are_written_by_address() {
  std::vector<unsigned char> from(1 << 20), to(1 << 20);
  for (size_t i = 0; i < from.size(); i++) from[i] = static_cast<unsigned char>(i * 3 + i / 4096);
  auto over = [](std::vector<unsigned char> &bytes, const std::string &config) {
    kvt_entry_t entry = {reinterpret_cast<uintptr_t>(bytes.data()), bytes.size(), 0, -1, KVT_HOST_MEMORY, 0};
    kvt_component_t component;
    memset(&component, 0, sizeof component);
    component.kind = KVT_COMPONENT_MEMORY;
    component.entries = &entry;
    component.entries_len = 1;
    kvt_layout_t layout;
    memset(&layout, 0, sizeof layout);
    layout.abi_version = KVT_ABI_VERSION;
    layout.components = &component;
    layout.components_len = 1;
    kvt_engine_t *engine = nullptr;
    EXPECT(KVT_OK, kvt_engine_new(config.data(), config.size(), &layout, &engine));
    return Engine(engine);
  };
  Engine writer = over(from, "");
  Engine closed = over(to, "{\"listen\": \"127.0.0.1:0\"}");
  Engine open = over(to, "{\"listen\": \"127.0.0.1:0\", \"writable_by_address\": true}");
  uint64_t source = reinterpret_cast<uintptr_t>(from.data()), target = reinterpret_cast<uintptr_t>(to.data());
  kvt_block_t blocks[3] = {{source + 100, target + 5000, 3000}, {source, target + 100000, 70000}, {source, target, 0}};
  uint64_t peer = connect_to(writer.get(), closed.get());
  FAILS(KVT_BAD_ITEMS, "writable_by_address", kvt_engine_write(writer.get(), peer, blocks, 3, 20000));
  peer = connect_to(writer.get(), open.get());
  EXPECT(KVT_OK, kvt_engine_write(writer.get(), peer, blocks, 3, 20000));
  EXPECT(KVT_OK, kvt_engine_write(writer.get(), peer, nullptr, 0, 20000));
  for (const kvt_block_t &block : blocks)
    CHECK(memcmp(to.data() + (block.target - target), from.data() + (block.source - source), block.len) == 0);
  CHECK(to[4999] == 0 && to[8000] == 0 && to[99999] == 0 && to[170000] == 0);
  kvt_block_t outside = {source, target + to.size() - 1, 2};
  EXPECT(KVT_BAD_ITEMS, kvt_engine_write(writer.get(), peer, &outside, 1, 20000));
}

void next_line() {
  int letter = 0;
  do letter = getchar();
  while (letter != '\n' && letter != EOF);
}

// An engine that only listens, until a line comes.
void serve() {
  static world_t world;
  describe(&world);
  {
    Engine engine = engine_over(world, "{\"listen\": \"127.0.0.1:0\"}");
    char address[64];
    listening(engine.get(), address, sizeof address);
    puts(address);
    fflush(stdout);
    next_line();
  }
  free(world.pages);
}

// Probes a peer whenever a line comes, and says what came of it.
void probe(const char *address, int times) {
  static world_t world;
  describe(&world);
  {
    Engine engine = engine_over(world, "");
    uint64_t peer = 0;
    EXPECT(KVT_OK, kvt_peer_connect(engine.get(), address, strlen(address), 5000, &peer));
    for (int i = 0; i < times; i++) {
      next_line();
      uint64_t round_trip_ns = 0;
      kvt_status_t status = kvt_peer_probe(engine.get(), peer, 300, &round_trip_ns);
      CHECK((status == KVT_OK) == (round_trip_ns > 0));
      puts(kvt_status_text(status));
      fflush(stdout);
    }
  }
  free(world.pages);
}

}  // namespace

int main(int argc, char **argv) {
  if (argc > 1 && strcmp(argv[1], "serve") == 0) return serve(), 0;
  if (argc > 2 && strcmp(argv[1], "probe") == 0) return probe(argv[2], 3), 0;
  many_rooms("\"same_host\": \"off\"");
  many_rooms("\"same_host\": \"pull\"");
  many_rooms("\"same_host\": \"ring\"");
  reasons_reach_the_other_side();
  memory_is_released_and_restored();
  blocks_are_written_by_address();
  the_log_goes_to_one_sink();
  a_registry_answers();
  reports_are_json();
  puts("C++ client: ok");
  return 0;
}
