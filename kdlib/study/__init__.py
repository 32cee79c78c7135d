"""A study file as validated, frozen settings; loads no torch."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["StudyError", "Settings"],
        "data": ["HuggingFace", "Relabel", "parse_part", "Data", "cache_folder",
            "data_path"],
        "models": ["MODELS", "parse_hub", "Model", "StoredOutputs", "Teacher",
            "TrainedTeacher", "LoadedTeacher", "PretrainedTeacher", "AnyTeacher", "Student"],
        "training": ["ResizedCrop", "ColourJitter", "Blur", "Augment", "Training", "Compute",
            "Tracking"],
        "user_code": ["UserCode"],
        "objectives": ["Objective", "CrossEntropy", "LabelSmoothing", "KD", "LogitMSE",
            "DKD", "DIST", "Hint", "Attention", "RKD", "Similarity", "CRD", "Tokens",
            "UserObjective", "AnyObjective", "OBJECTIVES", "needs_teacher"],
        "selections": ["DIFFICULTY", "SCORES", "REGION_STRATEGIES", "SHARD_POLICIES",
            "RANKINGS", "PICKED", "Dynamics", "ExtraRecordings", "Selection", "Ranking",
            "Mixture", "CCS", "D2", "Moderate", "KCenter", "Herding", "DualBeta", "UserSelection",
            "AnySelection", "CORESETS", "SELECTIONS", "STRATEGIES", "built_in_rule"],
        "evaluation": ["AXES", "MEASURES", "OWN", "Axes", "Probe", "Compare"],
        "cells": ["Cell"],
        "load": ["load_study", "study_file", "study_from"],
        "study": ["STEPS", "Study"],
    },
)  # fmt: skip
