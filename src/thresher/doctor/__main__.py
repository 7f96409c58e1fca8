"""Run `thresher.tools.doctor`."""

import runpy

runpy.run_module("thresher.tools.doctor", run_name="__main__")
