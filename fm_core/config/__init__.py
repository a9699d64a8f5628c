"""The configuration tree: typed sections that accept no unknown keys."""

from fm_core.config.data import DataSection, PairsSection, SourceSection
from fm_core.config.evaluate import EvaluateSection, ExtractorSection, LikelihoodSection, NfeCurveSection
from fm_core.config.export import ExportSection
from fm_core.config.launch import LaunchSection
from fm_core.config.method import MethodSection
from fm_core.config.model import ModelSection
from fm_core.config.online_eval import OnlineEvalSection
from fm_core.config.report import ReportSection
from fm_core.config.reproduce import (
    ExperimentSection,
    FewStepsSection,
    ImagesSection,
    ReproduceSection,
    StudentSection,
    Toy2dSection,
)
from fm_core.config.run import RunSection
from fm_core.config.sample import GuideSection, SampleSection, StochasticSection
from fm_core.config.section import Section
from fm_core.config.sweep import SweepSection
from fm_core.config.train import TrainSection
from fm_core.config.tree import (
    EARLIER_DEFAULTS,
    RunConfig,
    config_class,
    dump_yaml,
    load_config,
    merge,
    parse_config,
    present_names,
    read_yaml,
)

__all__ = [
    "EARLIER_DEFAULTS",
    "DataSection",
    "EvaluateSection",
    "ExperimentSection",
    "ExportSection",
    "ExtractorSection",
    "FewStepsSection",
    "GuideSection",
    "ImagesSection",
    "LaunchSection",
    "LikelihoodSection",
    "MethodSection",
    "ModelSection",
    "NfeCurveSection",
    "OnlineEvalSection",
    "PairsSection",
    "ReportSection",
    "ReproduceSection",
    "RunConfig",
    "RunSection",
    "SampleSection",
    "Section",
    "SourceSection",
    "StochasticSection",
    "StudentSection",
    "SweepSection",
    "Toy2dSection",
    "TrainSection",
    "config_class",
    "dump_yaml",
    "load_config",
    "merge",
    "parse_config",
    "present_names",
    "read_yaml",
]
