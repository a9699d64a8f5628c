"""The method section: path, objective, coupling, times."""

from fm_core.config.section import Options, Section


class MethodSection(Section):
    """The probability path, what is regressed, and how training pairs and times are drawn."""

    path: str = "optimal-transport"
    """A built-in path (optimal-transport, variance-preserving, ...) or package.module:Class."""
    path_options: Options = {}
    """The path's own numbers and words, e.g. {sigma_min: 1e-5}."""
    objective: str = "flow-matching"
    """A built-in objective (flow-matching, score-matching, ...) or package.module:Class."""
    objective_options: Options = {}
    """The objective's own numbers and words, e.g. {divergence: exact} of maximum-likelihood."""
    coupling: str = "independent"
    """How noise and data are paired: independent or minibatch-optimal-transport."""
    coupling_options: Options = {}
    """The coupling's own numbers, e.g. {block: 64}."""
    times: str = "uniform"
    """Distribution of t: uniform, logit-normal or edm."""
    times_options: Options = {}
    """The time distribution's own numbers."""
