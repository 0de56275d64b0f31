from __future__ import annotations

import os
import subprocess
import sys

import pytest

from infoprune_export.errors import InputError
from infoprune_export.validation.affinity import allowed, parse, pin, spans


def test_numbers_and_ranges():
    assert parse("0,2-4,7") == [0, 2, 3, 4, 7] and spans([7, 0, 2, 3, 4]) == "0,2-4,7"
    for wrong in ("", "a", "3-1", "-1", "1,"):
        with pytest.raises(ValueError):
            parse(wrong)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="a system that does not pin processes")
def test_a_pinned_process_stays_where_it_is_put():
    last = allowed()[-1]
    code = f"from infoprune_export.validation.affinity import allowed, pin; pin([{last}]); print(allowed())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str([last])
    with pytest.raises(InputError, match=f"CPU {last + 1000} is not among those that this process may use"):
        pin([last + 1000])
