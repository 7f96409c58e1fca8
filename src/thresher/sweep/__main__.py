"""Run `thresher.tools.sweep`."""

import runpy

runpy.run_module("thresher.tools.sweep", run_name="__main__")
