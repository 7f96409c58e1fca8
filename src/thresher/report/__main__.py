"""Run `thresher.tools.report`."""

import runpy

runpy.run_module("thresher.tools.report", run_name="__main__")
