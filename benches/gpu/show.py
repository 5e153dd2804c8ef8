#!/usr/bin/env python3
"""The figures in a log of run.sh (`show.py one LOG`) or nvlink.sh (`show.py two LOG`), then the table of goals.

Every goal is a line: what it asks for, what the log has, and whether that reaches it. What the log does not have is "not run".
"""
import json
import re
import sys
from collections import defaultdict

# A row of kvgpu: what, number, unit, ratio, word, note.
ROW = re.compile(r"^(?P<what>\S.{0,57}\S?) +(?P<number>-?\d+\.\d+) (?P<unit>GB/s|ms|us) *(?P<ratio>\d+\.\d+)? *(?P<word>right|WRONG)? *(?P<note>.*)$")


class Log:
    def __init__(self, path):
        self.rows, self.json, self.lines = defaultdict(dict), defaultdict(list), defaultdict(list)
        step = ""
        for line in open(path, encoding="utf-8", errors="replace"):
            line = line.rstrip("\n")
            if line.startswith("== "):
                step = line[3:].strip()
            self.lines[step].append(line)
            found = ROW.match(line)
            if line.startswith('{"'):
                self.json[step].append(json.loads(line))
            elif found and found["unit"]:
                self.rows[step][found["what"].strip()] = found

    def rate(self, step, what):
        """GB/s and the ratio of the first row whose name has all of these words."""
        for name, row in self.rows.get(step, {}).items():
            if all(word in name for word in what):
                return float(row["number"]), float(row["ratio"]) if row["ratio"] else None
        return None

    def single(self, step, case):
        return next((row["gb_per_s"] for row in self.json.get(step, []) if row["case"] == case and "gb_per_s" in row), None)

    def many(self, step, key="one_way_gb_per_s"):
        return next((row[key] for row in self.json.get(step, []) if key in row), None)


def figures(log):
    for step, rows in log.json.items():
        for row in rows:
            if "gb_per_s" in row:
                right = "right" if row["verified"] else "WRONG"
                print(f"{step:44} {row['case']:10} {row['gb_per_s']:8.1f} GB/s  p50 {row['p50_us']:9.0f} us  cpu {row['cpu_s_per_gib']:.3f} s/GiB  "
                      f"plain {row['reference_gb_per_s']:6.1f} GB/s {right}")
                if step == "mapping refused":
                    print(f"    the path's reason: {row.get('path_reason', '')}")
            elif "late_blocks" in row:
                print(f"{step:44} {row['path']}: one way {row['one_way_gb_per_s']:.1f} GB/s, both ways {row['both_ways_gb_per_s']:.1f} GB/s")
                kinds = ", ".join(f"{kind.replace('_', ' ')} {row[kind]}" for kind in (
                    "frozen_receivers", "frozen_senders", "killed_receivers", "killed_senders"))
                if "many" not in step:
                    print(f"    {kinds}; failed {row['failed']}, late blocks {row['late_blocks']}, wrong {row['wrong_blocks']}, "
                          f"told late {row['told_late']}, longest wait {row['longest_ms']} ms")
                if row["restarts"]:
                    print(f"    {row['restarts']} restarts of {row['restart_ms']:.1f} ms; before {row['before']}")
                    print(f"    after {row['after']}; leaked: {row['leaked'] or 'nothing'}")


def goal(what, value, least, unit="GB/s", note=""):
    if value is None:
        verdict, shown = "not run", "-"
    else:
        verdict, shown = ("reached" if value >= least else "MISSED"), f"{value:.2f}" if unit == "of it" else f"{value:.0f}"
    print(f"{what:84} {shown:>8} {unit:5}  goal {least:<6} {verdict} {note}")


def over(value, by):
    return value / by if value is not None and by else None


def faults(log, steps):
    for step in steps:
        row = next((row for row in log.json.get(step, []) if "late_blocks" in row), None)
        if row is None:
            print(f"{step + ': 0 late pages, told by the deadline, nothing left':84} {'-':>8} {'':5}  {'':11} not run")
            continue
        bad = row["late_blocks"] + row["wrong_blocks"] + row["told_late"] + len(row["leaked"])
        said = f"{row['failed']} transfers hit, {row['late_blocks']} late, {row['told_late']} told late, {row['restarts']} restarts, leaked {row['leaked'] or 'nothing'}"
        print(f"{step + ': 0 late pages, told by the deadline, nothing left':84} {bad:8} bad    {'':10} {'MISSED' if bad else 'reached'} ({said})")


def engine(log):
    for case, name, least in (("short-16k", "16 KiB", 1500), ("pages-4k", "4 KiB", 1300)):
        goal(f"engine, {name}, 8 % of the multiprocessors, 16 transfers queued", log.many(f"many, pull, {case}, bulk"), 400)
        goal(f"engine, {name}, no bound, 16 transfers queued", log.many(f"many, pull, {case}, no bound"), least)
        goal(f"engine, {name}, no bound, 4 lanes, 16 transfers queued", log.many(f"many, pull, {case}, no bound, 4 lanes"), least)


def late_event(log):
    lines = [line for line in log.lines.get("an event that is late", []) if re.search(r" (right|WRONG) ", line)]
    wrong = sum("WRONG" in line for line in lines)
    verdict = "not run" if not lines else "MISSED" if wrong else "reached"
    print(f"{'pages pushed behind an event of a stream that is late, and controls':84} {wrong if lines else '-':>8} wrong of {len(lines):<5} {verdict}")


def heads(log):
    for line in log.lines.get("unequal ranks", []):
        found = re.search(r"^heads (.*), 128 MiB .* (\d+) wire operations for (\d+) slices", line)
        if found:
            goal(f"unequal ranks {found[1]}: slices for each wire operation", int(found[3]) / int(found[2]), 100, "")


def one(log):
    for page, least in ((16384, 1500), (4096, 1300)):
        value = log.rate("ipc", ("cudaMalloc: window", f"x {page} B", "Full"))
        goal(f"ipc, windows of {page} B out of another process, no bound", value and value[0], least)
        if page == 16384:
            goal(f"ipc, windows of {page} B, no bound, of the plain copy of the same run", value and value[1], 0.90, "of it")
        value = log.rate("ipc", ("cudaMalloc: window", f"x {page} B", "Polite Bulk"))
        goal(f"ipc, windows of {page} B, 8 % of the multiprocessors", value and value[0], 400)
    engine(log)
    for path, free in (("tcp", ("many, tcp", "many, tcp, batches of 8 MiB")), ("tcp, 8 lanes", ("many, tcp, 8 lanes",)), ("ring", ("many, ring",)), ("ring of 64 MiB", ("many, ring of 64 MiB",))):
        host = log.many(f"many, host {path}")
        for step in free:
            goal(f"staged {step[6:]}, of host to host {path}", over(log.many(step), host), 0.90, "of it")
    for what, name in (("no wire", "no wire, of pinned to device"), ("device, tcp", "staged tcp, both engines in one process, of host to host"),
                       ("device, ring", "staged ring, both engines in one process, of host to host")):
        value = log.rate("staging", (what,))
        goal(name, value and value[1], 0.85 if what == "no wire" else 0.90, "of it", f"({value[0]:.1f} GB/s)" if value else "")
    late_event(log)
    value = log.rate("kernels", ("pages 16384 B", "no bound Vector"))
    goal("kernels, pages of 16 KiB, no bound, of the plain copy", value and value[1], 0.80, "of it")
    for what in ("pack", "unpack"):
        value = log.rate("kernels", (f"{what} slices 1024 B", "Full"))
        goal(f"kernels, {what} slices of 1 KiB, no bound, of the plain copy", value and value[1], 0.60, "of it")
    stolen = [re.search(r"bulk +10 blocks: alone.*takes ([\d.]+) of", line) for line in log.lines.get("a matmul beside copies", [])]
    stolen = next((float(found[1]) for found in stolen if found), None)
    goal("product's time alone, of its time beside copies without pause in 8 %", stolen and 1 / stolen, 0.95, "of it")
    faults(log, [f"faults and restarts, {path}" for path in ("pull", "tcp", "ring")])
    heads(log)
    rivals(log)


def two(log):
    plain = log.rate("ipc", ("cudaMalloc: plain copy of the mapping",))
    print(f"{'the driver copies 8 GiB that lie together between the two, GB/s':84} {plain[0] if plain else 'not run':>8}")
    for page, least in ((1 << 20, 0.90), (16384, 0.90), (4096, 0.80)):
        for blocks in ("Full", "Polite Bulk"):
            value = log.rate("ipc", ("cudaMalloc: window", f"x {page} B", blocks))
            note = f"({value[0]:.0f} GB/s)" if value else ""
            goal(f"ipc, windows of {page} B, {'no bound' if blocks == 'Full' else '8 %'}, of the driver's copy", value and value[1], least, "of it", note)
    for step in ("pull", "pull, no bound"):
        for case, least in (("pages-16k", 0.90), ("pages-4k", 0.80), ("pages-1m", 0.90), ("one-1gib", 0.90)):
            if step == "pull" or case in ("pages-16k", "pages-4k"):
                value = log.single(step, case)
                goal(f"engine, {step}, {case}, one transfer, of the driver's copy", over(value, plain and plain[0]), least, "of it", f"({value:.0f} GB/s)" if value else "")
    for case in ("short-16k", "pages-4k"):
        for kernel in ("bulk", "thin", "no bound"):
            step = f"many, pull, {case}, {kernel}"
            ways = [log.many(step, key) for key in ("one_way_gb_per_s", "both_ways_gb_per_s")]
            print(f"{step + ': one way, both ways at once, GB/s':84} " + (" ".join(f"{way:8.0f}" for way in ways) if None not in ways else "not run"))
    for path in ("tcp", "ring"):
        goal(f"staged {path} between the two, of host to host", over(log.many(f"faults and restarts, {path}"), log.many(f"many, host {path}")), 0.90, "of it")
    refused = log.single("mapping refused", "pages-16k")
    print(f"{'mapping refused: the engines stage by themselves, GB/s':84} {f'{refused:8.1f}' if refused else 'not run'}")
    faults(log, [f"faults and restarts, {path}" for path in ("pull", "tcp", "ring")])
    late_event(log)
    heads(log)
    rivals(log)


def rivals(log):
    rows = [line for line in log.lines.get("rivals", []) if re.match(r"(engine|kvtransfer|nixl|mooncake)[-a-z]* ", line)]
    print("rivals: " + ("" if rows else "not run"))
    for line in rows:
        print("    " + line)


def main():
    log = Log(sys.argv[2])
    figures(log)
    print("---- goals")
    {"one": one, "two": two}[sys.argv[1]](log)


if __name__ == "__main__":
    main()
