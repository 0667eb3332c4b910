"""The reader of steps of `ingestd bench tensors` in Python; the bench starts it and asks it by lines of JSON."""

import argparse
import json
import sys
import time

import ingestd
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--address", required=True)
    parser.add_argument("--table", required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--tensors", type=int, required=True)
    parser.add_argument("--producers", type=int, required=True)
    options = parser.parse_args()
    elements = options.bytes // 4 // options.tensors
    out = {f"layers.{i}.weight": np.zeros(elements, np.float32) for i in range(options.tensors)}
    manifest = ingestd.Manifest.from_arrays(out)
    want = sum(range(1, options.producers + 1))
    arrays = [np.full(options.bytes // 4, p + 1, np.float32) for p in range(options.producers)]
    into = np.zeros(options.bytes // 4, np.float32)

    def answer(**values: object) -> None:
        print(json.dumps(values), flush=True)

    with ingestd.GradReader(options.address, options.table, manifest=manifest) as reader:
        answer(ready={})
        for line in sys.stdin:
            ask = json.loads(line)
            if ask["do"] == "step":
                with reader.step(ask.get("upto", 0), quorum=options.producers, deadline=60) as step:
                    began = time.perf_counter_ns()
                    step.sum(out)
                    took = time.perf_counter_ns() - began
                if any(array[0] != want or array[-1] != want for array in out.values()):
                    answer(error="the sums are wrong")
                    continue
                answer(values={"took": took, "spilled": reader.stats.spilled_bytes})
            elif ask["do"] == "loop":
                into[:] = 0
                began = time.perf_counter_ns()
                for array in arrays:
                    np.add(into, array, out=into)
                answer(values={"took": time.perf_counter_ns() - began})
            elif ask["do"] == "stop":
                answer()
                return
            else:
                answer(error=f"this process does not know what {ask['do']!r} means")


if __name__ == "__main__":
    main()
