"""The method section: path, objective, coupling and time distribution."""

from fm_core.config.section import Options, Section


class MethodSection(Section):
    """The probability path, the training objective, and how training pairs and times are drawn."""

    path: str = "optimal-transport"
    """A built-in path (optimal-transport, variance-preserving, ...) or package.module:Class."""
    path_options: Options = {}
    """Options of the path, e.g. {sigma_min: 1e-5}."""
    objective: str = "flow-matching"
    """A built-in objective (flow-matching, score-matching, ...; meanflow or split-meanflow for a flow map,
    sampled in a few evaluations by sample.solver flow_map) or package.module:Class."""
    objective_options: Options = {}
    """Options of the objective, e.g. {divergence: exact} for maximum-likelihood. Of a flow map: equal_times
    (0.75), weight_power (1; of split-meanflow 0), guidance (1; the scale of classifier-free guidance that is
    learned), and of meanflow tangent (network or conditional)."""
    coupling: str = "independent"
    """How noise and data are paired: independent, minibatch-optimal-transport, for class-conditional models
    class-optimal-transport or conditional-optimal-transport, or reflow: as the samples of data.pairs."""
    coupling_options: Options = {}
    """Options of the coupling, e.g. {block: 64}."""
    times: str = "uniform"
    """Distribution of t, and of the second time of a flow map: uniform, logit-normal or edm."""
    times_options: Options = {}
    """Options of the time distribution."""
