#!/usr/bin/env python3
"""What copies cost a model beside them: a bf16 matrix product in a loop, alone and while pages are copied on a low-priority
stream of the same process, by our kernels, by the copy engine, or not at all (blocks that only sit on a multiprocessor, so
that what the seats cost is told apart from what the bytes cost). Needs torch and cupy; the kernels are compiled from copy.cu.

    theft.py copy.cu
"""
import ctypes
import json
import os
import sys
import tempfile
import time

import cupy
import numpy
import torch

PAGE = 16384
GIB = 2
N = 8192
REPEATS = 40


def divisor(value):
    shift = (value - 1).bit_length()
    return value, ((((1 << shift) - value) << 32) // value) + 1, shift


def vector_shape(total_bytes):
    shape = numpy.zeros(1, dtype=[("strides", "u8", 2), ("numbers", "u4", 8)])
    shape["strides"] = PAGE
    shape["numbers"] = (0, total_bytes // 16, *divisor(PAGE // 16), *divisor(1))
    return shape


def bulk_shape(pages, part=16384, stages=3):
    parts = PAGE // part
    shape = numpy.zeros(1, dtype=[("strides", "u8", 2), ("numbers", "u4", 12)])
    shape["strides"] = PAGE
    shape["numbers"] = (0, pages * parts, PAGE, part, stages, stages // 3, *divisor(parts), *divisor(1))
    return shape


# A block that holds all of a multiprocessor's shared memory and moves nothing.
HOLD = r"""
extern "C" __global__ void __launch_bounds__(32, 1) hold(unsigned long long nanoseconds) {
    unsigned long long begin, now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(begin));
    do {
        __nanosleep(1000);
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    } while (now - begin < nanoseconds);
}
"""


def resources_of_product(torch, left, right):
    """What the product's kernel takes of a multiprocessor, as the profiler tells it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        torch.mm(left, right)
        torch.cuda.synchronize()
    path = os.path.join(tempfile.mkdtemp(), "trace.json")
    profile.export_chrome_trace(path)
    with open(path, encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    for event in events:
        if event.get("cat") == "kernel":
            facts = event["args"]
            print("product's kernel:", event["name"][:90], {key: facts.get(key) for key in (
                "registers per thread", "shared memory", "block", "grid", "blocks per SM", "est. achieved occupancy %")})


def main():
    source = open(sys.argv[1], encoding="utf-8").read()
    module = cupy.RawModule(code=source, backend="nvrtc", options=("--std=c++17",))
    vector = module.get_function("kvt_pairs_16")
    deep = module.get_function("kvt_pairs_16_deep")
    bulk = module.get_function("kvt_bulk_pairs")
    bulk.max_dynamic_shared_size_bytes = 4 * 12 * 4096
    thin = module.get_function("kvt_thin_pairs")
    hold = cupy.RawModule(code=HOLD, backend="nvrtc").get_function("hold")
    hold.max_dynamic_shared_size_bytes = 200 << 10

    pages = GIB * (1 << 30) // PAGE
    source_pool = torch.randint(0, 255, (GIB << 30,), dtype=torch.uint8, device="cuda")
    target_pool = torch.zeros_like(source_pool)
    order = torch.randperm(pages, device="cuda")
    pairs = torch.stack([source_pool.data_ptr() + order * PAGE, target_pool.data_ptr() + torch.arange(pages, device="cuda") * PAGE], 1)
    pairs = pairs.contiguous()

    left = torch.randn(N, N, dtype=torch.bfloat16, device="cuda")
    right = torch.randn(N, N, dtype=torch.bfloat16, device="cuda")
    least, _ = torch.cuda.Stream.priority_range() if hasattr(torch.cuda.Stream, "priority_range") else (0, -1)
    model = torch.cuda.Stream(priority=-1)
    side = torch.cuda.Stream(priority=least)

    cuda = ctypes.CDLL("libcuda.so.1")
    no_batches = []

    def batch_copy(stream):
        """Pages one by one, as the driver's list of copies: copy engines only. 4,096 of them."""
        count = 4096
        if not batch_copy.lists:
            host = pairs[:count].cpu().numpy().astype(numpy.uint64)
            batch_copy.lists = [numpy.ascontiguousarray(host[:, 1]), numpy.ascontiguousarray(host[:, 0]),
                                numpy.full(count, PAGE, dtype=numpy.uint64)]
        target, source, sizes = (each.ctypes.data_as(ctypes.c_void_p) for each in batch_copy.lists)
        # CUmemcpyAttributes: source is read in stream order, no location hints.
        attributes, first = (ctypes.c_uint * 6)(1), (ctypes.c_size_t * 1)(0)
        code = cuda.cuMemcpyBatchAsync_v2(target, source, sizes, ctypes.c_size_t(count), attributes, first, ctypes.c_size_t(1),
                                          ctypes.c_void_p(stream))
        if code and not no_batches:
            no_batches.append(code)
            print(f"cuMemcpyBatchAsync: error {code}")
    batch_copy.lists = None

    def launch_copy(kind, blocks, pages=pages):
        pointer = numpy.uint64(pairs.data_ptr())
        with cupy.cuda.ExternalStream(side.cuda_stream):
            if kind == "hold":
                hold((blocks,), (32,), (numpy.uint64(2_000_000),), shared_mem=200 << 10)
            elif kind == "engine":
                with torch.cuda.stream(side):
                    target_pool.copy_(source_pool, non_blocking=True)
            elif kind == "batch":
                batch_copy(side.cuda_stream)
            elif kind.startswith("thin"):
                kib = int(kind[4:])
                thin((blocks,), (32,), (pointer, bulk_shape(pages, 2048, kib // 2)), shared_mem=kib << 10)
            elif kind == "bulk":
                bulk((blocks,), (128,), (pointer, bulk_shape(pages)), shared_mem=4 * 12 * 4096)
            else:
                kernel, threads = (deep, 1024) if blocks <= 132 else (vector, 256)
                kernel((blocks,), (threads,), (pointer, vector_shape(pages * PAGE)))

    def matmuls(copy):
        """Milliseconds of a product; copies are kept enqueued until the products are done."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        copies = 0
        done = [torch.cuda.Event() for _ in range(4)]
        if copy:
            for event in done[:2]:
                launch_copy(*copy)
                side.record_event(event)
                copies += 1
        with torch.cuda.stream(model):
            begin.record()
            for _ in range(REPEATS):
                torch.mm(left, right)
            end.record()
        while copy and not end.query():
            if done[(copies - 2) % 4].query():
                launch_copy(*copy)
                side.record_event(done[copies % 4])
                copies += 1
        end.synchronize()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / REPEATS, copies

    def once(copy, moved):
        """Milliseconds of all products with one copy of so many bytes somewhere within."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        with torch.cuda.stream(model):
            begin.record()
            for number in range(REPEATS):
                torch.mm(left, right)
                if number == REPEATS // 4 and copy:
                    middle = torch.cuda.Event()
                    middle.record()
            end.record()
        if copy:
            side.wait_event(middle)
            launch_copy(*copy, pages=moved // PAGE)
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def copy_rate(copy):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        launch_copy(*copy)
        side.record_event(begin)
        for _ in range(3):
            launch_copy(*copy)
        side.record_event(end)
        end.synchronize()
        return 3 * pages * PAGE / begin.elapsed_time(end) / 1e6

    launch_copy("bulk", 10)
    torch.cuda.synchronize()
    view = target_pool.view(pages, PAGE)
    right_bytes = torch.equal(view, source_pool.view(pages, PAGE)[order])
    print(f"bulk copy checked against torch: {'right' if right_bytes else 'WRONG'}")
    resources_of_product(torch, left, right)
    matmuls(None)
    time.sleep(0.2)
    alone = min(matmuls(None)[0] for _ in range(3))
    print(f"matmul alone: {alone:.3f} ms, {2 * N ** 3 / alone / 1e9:.0f} TFLOP/s")
    sm_all = torch.cuda.get_device_properties(0).multi_processor_count
    for kind, blocks in [("hold", 2), ("hold", 4), ("hold", 10), ("thin6", sm_all), ("thin12", sm_all // 3), ("thin8", sm_all), ("thin12", sm_all),
                         ("thin12", 2 * sm_all), ("bulk", 1), ("bulk", 2), ("bulk", 4), ("bulk", 10), ("vector", 4), ("vector", 10),
                         ("vector", 2112), ("engine", 0), ("batch", 0)]:
        if kind == "batch" and not hasattr(cuda, "cuMemcpyBatchAsync_v2"):
            continue
        launch_copy(kind, blocks)
        torch.cuda.synchronize()
        if kind == "batch" and no_batches:
            continue
        rate = copy_rate((kind, blocks))
        again = min(matmuls(None)[0] for _ in range(2))
        both, copies = min(matmuls((kind, blocks)) for _ in range(3))
        moved = copies * pages * PAGE / (both * REPEATS) / 1e6
        if kind == "hold":
            print(f"hold   {blocks:5} blocks that move nothing: the matmul takes {both / again:.3f} of its time alone ({again:.3f} ms)")
            continue
        if kind == "batch":
            rate, moved = rate * 4096 / pages, moved * 4096 / pages
        print(f"{kind:6} {blocks:5} blocks: alone {rate:7.0f} GB/s; beside a matmul about {moved:6.0f} GB/s, "
              f"the matmul takes {both / again:.3f} of its time alone ({again:.3f} ms)")
    moved = 448 << 20
    for kind, blocks in [("bulk", 10), ("thin12", sm_all), ("vector", 10), ("vector", 2112)]:
        turns = [(once(None, 0), once((kind, blocks), moved)) for _ in range(9)]
        extra = sorted(both - alone for alone, both in turns)[4]
        base = sorted(alone for alone, _ in turns)[4]
        print(f"{kind:6} {blocks:5} blocks: one copy of 448 MiB (a prompt of 4,096 tokens of the SGLang test's model) among {base:.1f} ms "
              f"of products costs them {extra:.2f} ms, {100 * extra / base:.1f} %")
    return 0 if right_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
