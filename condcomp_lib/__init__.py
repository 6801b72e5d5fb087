"""condcomp: the reproducible companion to the conditional-computation papers.

The layers, lowest first: ground (errors, paths, datasets, runs, stats, published), model (targets), learning
(training), evidence (sweep, studies), telling (plots, tables, reproduce, cli). An import only points down.
"""

__version__ = "0.1.0"
