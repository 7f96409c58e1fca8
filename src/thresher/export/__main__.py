"""Run `thresher.tools.export`."""

import runpy

runpy.run_module("thresher.tools.export", run_name="__main__")
