"""The report: what a folder of runs gave, as a page, as files and as a table in the terminal."""
