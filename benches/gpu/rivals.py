#!/usr/bin/env python3
"""Other engines beside ours between the memories of GPUs: the pages of kvbench's cases, NIXL (UCX) and Mooncake through their
Python wheels, kvbench itself for ours, one table.

    rivals.py --gpu 0 [--peer-gpu 1] [--kvbench PATH] [--engines A,B] [--cases A,B] [--rounds N]
    rivals.py --host --tiny               in host memory: shows that it works where there is no GPU

The wheels are looked for as Python does; an engine that cannot be imported, or that fails, is a line that says so. Each engine is
two processes. The source's bytes are a function of the place and of the round, the target is poisoned before each round,
and every block of it is compared after each, those that were not asked for too. The clock runs from the post to the sender's
learning of the end; what a list of pages costs before (`prepare`) is told beside it, for ours it is in the figure.
"""
import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time

ENTRIES = 64
# Bytes of a block, blocks of a buffer, buffers: kvbench's cases.
CASES = {"pages-16k": (16 << 10, 512, ENTRIES), "pages-4k": (4 << 10, 1024, ENTRIES), "pages-1m": (1 << 20, 8, ENTRIES), "one-1gib": (1 << 30, 1, 1)}
TINY = 64
POISON = 0xA5
PATIENCE_S = 60
# What each is told so that it takes the way that it is named after; Mooncake's limits as far up as they go.
ENGINES = {
    "nixl": ("nixl", {}),
    "nixl-tcp": ("nixl", {"UCX_TLS": "tcp,self,cuda_copy"}),
    "mooncake-tcp": ("mooncake", {
        "MC_FORCE_TCP": "1", "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "65535", "MC_TCP_MAX_PENDING_ADMISSIONS_PER_PEER": "65535",
        "MC_TCP_ADMISSION_TIMEOUT_MS": "600000"}),
}
# Path of kvbench, its flags.
OURS = {"kvtransfer": ("shm", []), "kvtransfer-no-bound": ("shm", ["--gpu-percent", "100"]), "kvtransfer-tcp": ("tcp", ["--lanes", "4"]),
        "kvtransfer-ring": ("ring", ["--lanes", "4"])}


class Case:
    """Places of blocks, the same in both processes."""

    def __init__(self, name, is_tiny):
        import numpy

        self.block, pages, self.entries = CASES[name]
        if is_tiny:
            pages, self.block = max(pages // TINY, 1), (self.block if pages > 1 else self.block // TINY)
        self.pool = 1 if pages == 1 else 2 * pages
        random = numpy.random.default_rng(7)
        odd = numpy.arange(pages) * 2 + (pages > 1)
        buffers = numpy.arange(self.entries)[:, None] * self.pool
        # In blocks from the region's first byte; the same pages in every buffer, as a paged cache has them.
        self.source, self.target = ((buffers + random.permutation(odd)).reshape(-1) for _ in range(2))

    @property
    def region(self):
        return self.entries * self.pool * self.block

    @property
    def bytes(self):
        return len(self.source) * self.block


class Memory:
    """A region of the host's memory or of a GPU's, as words of 8 bytes."""

    def __init__(self, case, gpu):
        self.case, self.gpu, self.count = case, gpu, case.region // 8
        if gpu is None:
            import numpy

            self.words = numpy.zeros(self.count, numpy.int64)
            self.address, self.index = self.words.ctypes.data, lambda places: places
            self.range = lambda: numpy.arange(self.count, dtype=numpy.int64)
            self.done = lambda: None
        else:
            import torch

            device = f"cuda:{gpu}"
            torch.cuda.set_device(gpu)
            self.words = torch.zeros(self.count, dtype=torch.int64, device=device)
            self.address, self.index = self.words.data_ptr(), lambda places: torch.from_numpy(places).to(device)
            self.range = lambda: torch.arange(self.count, dtype=torch.int64, device=device)
            self.done = lambda: torch.cuda.synchronize(gpu)
        self.done()

    def pattern(self, seed):
        """What the source holds: a mix of each word's place and the round, with the wrapping of 64 bits."""
        words = self.range()
        words += (seed * 0x9E3779B97F4A7C1 + 1) % 2**63
        words *= 0x1B873593CC9E2D51
        words ^= words >> 29
        words *= 0x2545F4914F6CDD1D
        words ^= words >> 32
        return words

    def fill(self, seed):
        self.words[:] = self.pattern(seed)
        self.done()

    def poison(self):
        self.words[:] = int.from_bytes(bytes([POISON]) * 8, "little", signed=True)
        self.done()

    def wrong(self, seed):
        """Blocks that are not what they must be: the source's where asked for, poison elsewhere."""
        case, words = self.case, self.case.block // 8
        got, sent = self.words.reshape(-1, words), self.pattern(seed).reshape(-1, words)
        asked = (got[self.index(case.target)] != sent[self.index(case.source)]).any(-1).sum()
        touched = (got != int.from_bytes(bytes([POISON]) * 8, "little", signed=True)).any(-1).sum()
        return int(asked) + abs(int(touched) - len(case.target))

    def rows(self, places, address):
        """Address, length and device of each block."""
        import numpy

        rows = numpy.empty((len(places), 3), numpy.uint64)
        rows[:, 0] = address + places.astype(numpy.uint64) * numpy.uint64(self.case.block)
        rows[:, 1], rows[:, 2] = self.case.block, self.gpu or 0
        return rows


class Nixl:
    def __init__(self, role, memory):
        from nixl._api import nixl_agent, nixl_agent_config

        self.kind = "DRAM" if memory.gpu is None else "VRAM"
        self.agent = nixl_agent(role, nixl_agent_config(backends=["UCX"]))
        if not self.agent.register_memory([(memory.address, memory.case.region, memory.gpu or 0, "")], self.kind):
            raise RuntimeError("the memory was not registered")

    def contact(self):
        return self.agent.get_agent_metadata()

    def meet(self, contact):
        self.peer = self.agent.add_remote_agent(contact)

    def prepare(self, here, there):
        here, there = (self.agent.get_xfer_descs(rows, mem_type=self.kind) for rows in (here, there))
        self.handle = self.agent.initialize_xfer("WRITE", here, there, self.peer)

    def go(self):
        state, end = self.agent.transfer(self.handle), time.monotonic() + PATIENCE_S
        while state == "PROC" and time.monotonic() < end:
            state = self.agent.check_xfer_state(self.handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer's state is {state}")

    def forget(self):
        self.agent.release_xfer_handle(self.handle)


class Mooncake:
    def __init__(self, role, memory):
        from mooncake.engine import TransferEngine

        self.engine = TransferEngine()
        if self.engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("the engine did not start")
        if self.engine.register_memory(memory.address, memory.case.region):
            raise RuntimeError("the memory was not registered")

    def contact(self):
        return f"127.0.0.1:{self.engine.get_rpc_port()}"

    def meet(self, contact):
        self.peer = contact

    # Blocks of a call, below what it queues at most.
    CALL = 32768

    def prepare(self, here, there):
        columns = (here[:, 0], there[:, 0], here[:, 1])
        self.lists = [[column[at:at + self.CALL].tolist() for column in columns] for at in range(0, len(here), self.CALL)]

    def go(self):
        for lists in self.lists:
            code = self.engine.batch_transfer_sync_write(self.peer, *lists)
            if code:
                raise RuntimeError(f"the transfer's code is {code}")

    def forget(self):
        self.lists = None


def child(role, kind, pipe, name, is_tiny, gpu, peer_gpu):
    try:
        memory = Memory(Case(name, is_tiny), gpu)
        engine = {"nixl": Nixl, "mooncake": Mooncake}[kind](role, memory)
        pipe.send((engine.contact(), memory.address))
        while True:
            word, argument = pipe.recv()
            answer = None
            if word == "meet":
                contact, address = argument
                engine.meet(contact)
                here = memory.rows(memory.case.source, memory.address)
                there = memory.rows(memory.case.target, address)
                there[:, 2] = peer_gpu or 0
            elif word == "fill":
                memory.fill(argument)
            elif word == "poison":
                memory.poison()
            elif word == "wrong":
                answer = memory.wrong(argument)
            elif word == "go":
                begun = time.perf_counter()
                engine.prepare(here, there)
                posted = time.perf_counter()
                engine.go()
                answer = (posted - begun, time.perf_counter() - posted)
                engine.forget()
            elif word == "bye":
                # Engines of others that hang while they end must not hold up the next one.
                os._exit(0)
            pipe.send(answer)
    except Exception as error:
        pipe.send(error if isinstance(error, RuntimeError) else RuntimeError(f"{type(error).__name__}: {error}"))
        os._exit(1)


def heard(pipe):
    if not pipe.poll(2 * PATIENCE_S):
        raise RuntimeError(f"nothing was heard for {2 * PATIENCE_S} s")
    try:
        answer = pipe.recv()
    except EOFError:
        raise RuntimeError("its process died") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def ask(pipe, word, argument=None):
    pipe.send((word, argument))
    return heard(pipe)


def rival(engine, name, options):
    """Rounds of a rival."""
    kind, extra = ENGINES[engine]
    gpus = (None, None) if options.host else (options.gpu, options.gpu if options.peer_gpu is None else options.peer_gpu)
    context = multiprocessing.get_context("spawn")
    before, processes, pipes = dict(os.environ), [], []
    os.environ.update({"NIXL_LOG_LEVEL": "WARN", "GLOG_minloglevel": "2"})
    os.environ.update(extra if not options.host or "UCX_TLS" not in extra else {"UCX_TLS": "tcp,self"})
    try:
        for role, gpu, peer in (("sender", gpus[0], gpus[1]), ("receiver", gpus[1], gpus[0])):
            ours, theirs = context.Pipe()
            process = context.Process(target=child, args=(role, kind, theirs, name, options.tiny, gpu, peer), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        sender, receiver = pipes
        (contact, _), (there, address) = heard(sender), heard(receiver)
        ask(receiver, "meet", (contact, address))
        ask(sender, "meet", (there, address))
        rounds, wrong = [], 0
        for number in range(options.rounds + 1):
            ask(sender, "fill", number)
            ask(receiver, "poison")
            rounds.append(ask(sender, "go"))
            wrong += ask(receiver, "wrong", number)
        for pipe in pipes:
            pipe.send(("bye", None))
    finally:
        os.environ.clear()
        os.environ.update(before)
        for process in processes:
            process.join(5)
            process.kill()
    # The first one meets connections and mappings that are not there yet.
    prepare, go = (statistics.median(column) for column in zip(*rounds[1:]))
    case = Case(name, options.tiny)
    return {"engine": engine, "case": name, "gb_per_s": case.bytes / go / 1e9, "prepare_ms": prepare * 1e3, "wrong": wrong}


def ours(engine, name, options):
    """The same by kvbench."""
    path, flags = OURS[engine]
    command = [options.kvbench, "--json", "--path", path, "--case", name, "--rounds", str(options.rounds), *flags]
    command += ["--tiny"] if options.tiny else []
    if not options.host:
        command += ["--gpu", str(options.gpu)] + ([] if options.peer_gpu is None else ["--peer-gpu", str(options.peer_gpu)])
    elif "--gpu-percent" in flags:
        raise RuntimeError("not in host memory")
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if not rows:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"it said nothing, exit {done.returncode}")
    return {"engine": engine, "case": name, "gb_per_s": rows[0]["gb_per_s"], "prepare_ms": None, "wrong": int(not rows[0]["verified"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", type=int, default=0)
    parser.add_argument("--peer-gpu", type=int)
    parser.add_argument("--host", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--kvbench", help="without it ours is left out")
    parser.add_argument("--engines", default=",".join([*OURS, *ENGINES]))
    parser.add_argument("--cases", default="pages-16k,pages-4k,pages-1m,one-1gib")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=600, help="nothing begins later than this")
    options = parser.parse_args()
    begun, is_sound = time.monotonic(), True
    print(f"{'engine':20} {'case':10} {'GB/s':>9} {'prepare ms':>11}")
    for name in options.cases.split(","):
        for engine in options.engines.split(","):
            if engine in OURS and not options.kvbench:
                continue
            if time.monotonic() - begun > options.seconds:
                print(f"{engine:20} {name:10} not run: no time was left", flush=True)
                continue
            try:
                row = (ours if engine in OURS else rival)(engine, name, options)
            except Exception as error:
                print(f"{engine:20} {name:10} does not run: {str(error).splitlines()[0] if str(error) else type(error).__name__}", flush=True)
                is_sound &= engine not in OURS or options.host
                continue
            prepare = "in it" if row["prepare_ms"] is None else f"{row['prepare_ms']:.1f}"
            # Without the word that the other tables count: a rival's wrong bytes are not ours.
            right = "right" if not row["wrong"] else f"{row['wrong']} blocks are not right"
            print(f"{engine:20} {name:10} {row['gb_per_s']:9.2f} {prepare:>11} {right}", flush=True)
            is_sound &= not row["wrong"] or engine not in OURS
    return 0 if is_sound else 1


if __name__ == "__main__":
    sys.exit(main())
