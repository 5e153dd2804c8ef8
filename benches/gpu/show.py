#!/usr/bin/env python3
"""The lines of JSON in a log of run.sh or nvlink.sh as a table: `show.py LOG`."""
import json
import sys


def main():
    step = ""
    for line in open(sys.argv[1], encoding="utf-8"):
        if line.startswith("== "):
            step = line[3:].strip()
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        if "gb_per_s" in row:
            right = "right" if row["verified"] else "WRONG"
            print(f"{step:32} {row['case']:10} {row['gb_per_s']:8.1f} GB/s  p50 {row['p50_us']:9.0f} us  cpu {row['cpu_s_per_gib']:.3f} s/GiB  "
                  f"plain {row['reference_gb_per_s']:6.1f} GB/s {right}")
        elif "late_blocks" in row:
            print(f"{step:32} {row['path']}: one way {row['one_way_gb_per_s']:.1f} GB/s, both ways {row['both_ways_gb_per_s']:.1f} GB/s")
            kinds = ", ".join(f"{kind.replace('_', ' ')} {row[kind]}" for kind in (
                "frozen_receivers", "frozen_senders", "killed_receivers", "killed_senders"))
            print(f"    {kinds}; failed {row['failed']}, late blocks {row['late_blocks']}, wrong {row['wrong_blocks']}, "
                  f"told late {row['told_late']}, longest wait {row['longest_ms']} ms")
            if row["restarts"]:
                print(f"    {row['restarts']} restarts of {row['restart_ms']:.1f} ms; before {row['before']}")
                print(f"    after {row['after']}; leaked: {row['leaked'] or 'nothing'}")


if __name__ == "__main__":
    main()
