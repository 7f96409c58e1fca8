"""Run `thresher.tools.bench`."""

import runpy

runpy.run_module("thresher.tools.bench", run_name="__main__")
