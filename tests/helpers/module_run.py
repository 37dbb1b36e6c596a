"""`python -m MODULE WORDS...` as a script, for forks: python tests/helpers/module_run.py MODULE WORDS..."""

import os
import runpy
import sys

if __name__ == "__main__":
    sys.path[0] = os.getcwd()  # as `python -m` has it
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
