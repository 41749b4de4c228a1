"""How much of PyTorch's OpInfo database has kernels: a sample of its calls through torch.compile(backend="effc").

    python bench/opinfo.py [--calls 4] [--family elementwise]

Each call is compared with eager PyTorch; a call counts as compiled if none of its ops ran through ATen.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from collections import Counter

import torch
from effc.tests.opinfo_cases import DTYPES, FAMILIES, check_all, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=4, help="of each op, at most")
    parser.add_argument("--family", choices=list(FAMILIES), action="append", help="default: all")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    fallbacks: Counter[str] = Counter()
    print(f"{'family':14} {'dtype':9} {'calls':>6} {'wrong':>6} {'through ATen':>13}")
    for family in options.family or FAMILIES:
        for dtype in DTYPES:
            outcome = check_all(sample(family, dtype, options.calls), batch=48)
            total = sum(outcome.fallbacks.values())
            print(f"{family:14} {str(dtype)[6:]:9} {outcome.cases:6} {len(outcome.failures):6} {total:13}", flush=True)
            for name, reason in outcome.failures.items():
                print(f"    {name}: {reason}")
            fallbacks.update(outcome.fallbacks)
    print("\nthrough ATen, by how often:")
    for reason, count in fallbacks.most_common():
        print(f"{count:5}  {reason}")


if __name__ == "__main__":
    main()
