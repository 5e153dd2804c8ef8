#!/usr/bin/env python3
"""What copies cost a model beside them: a bf16 matrix product in a loop, alone and while pages are copied by our kernels
on a low-priority stream of the same process. Needs torch and cupy; the kernels are compiled from copy.cu.

    theft.py copy.cu
"""
import sys
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


def bulk_shape(pages):
    parts, stages = PAGE // 4096, 12
    shape = numpy.zeros(1, dtype=[("strides", "u8", 2), ("numbers", "u4", 12)])
    shape["strides"] = PAGE
    shape["numbers"] = (0, pages * parts, PAGE, 4096, stages, stages // 3, *divisor(parts), *divisor(1))
    return shape


def main():
    source = open(sys.argv[1], encoding="utf-8").read()
    module = cupy.RawModule(code=source, backend="nvrtc", options=("--std=c++17",))
    vector = module.get_function("kvt_pairs_16")
    deep = module.get_function("kvt_pairs_16_deep")
    bulk = module.get_function("kvt_bulk_pairs")
    bulk.max_dynamic_shared_size_bytes = 4 * 12 * 4096

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

    def launch_copy(kind, blocks, pages=pages):
        pointer = numpy.uint64(pairs.data_ptr())
        with cupy.cuda.ExternalStream(side.cuda_stream):
            if kind == "bulk":
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
    matmuls(None)
    time.sleep(0.2)
    alone = min(matmuls(None)[0] for _ in range(3))
    print(f"matmul alone: {alone:.3f} ms, {2 * N ** 3 / alone / 1e9:.0f} TFLOP/s")
    for kind, blocks in [("bulk", 2), ("bulk", 4), ("bulk", 6), ("bulk", 10), ("vector", 4), ("vector", 6), ("vector", 10), ("vector", 2112)]:
        rate = copy_rate((kind, blocks))
        again = min(matmuls(None)[0] for _ in range(2))
        both, copies = min(matmuls((kind, blocks)) for _ in range(3))
        moved = copies * pages * PAGE / (both * REPEATS) / 1e6
        print(f"{kind:6} {blocks:5} blocks: alone {rate:7.0f} GB/s; beside a matmul about {moved:6.0f} GB/s, "
              f"the matmul takes {both / again:.3f} of its time alone ({again:.3f} ms)")
    moved = 448 << 20
    for kind, blocks in [("bulk", 10), ("vector", 10), ("vector", 2112)]:
        turns = [(once(None, 0), once((kind, blocks), moved)) for _ in range(9)]
        extra = sorted(both - alone for alone, both in turns)[4]
        base = sorted(alone for alone, _ in turns)[4]
        print(f"{kind:6} {blocks:5} blocks: one copy of 448 MiB (a prompt of 4,096 tokens of the SGLang test's model) among {base:.1f} ms "
              f"of products costs them {extra:.2f} ms, {100 * extra / base:.1f} %")
    return 0 if right_bytes else 1


if __name__ == "__main__":
    sys.exit(main())
