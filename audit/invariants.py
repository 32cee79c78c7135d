"""What must hold after what went wrong in the two earlier studies, and the tests that prove it."""


def _test(module: str, name: str) -> str:
    """A test as pytest names it."""
    folder, slash, file = module.rpartition("/")
    return f"tests/{folder}{slash}test_{file}.py::test_{name}"


# (study, invariant, names of tests)
INVARIANTS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("A", "a run whose loader ignores its subset enters no table", (
        _test("steps/training", "a_loader_that_ignores_its_subset_cannot_finish_a_run"),
        _test("steps/compare", "a_row_with_another_budget_is_refused_and_shown"),
    )),
    ("A", "recording is invisible", (
        _test("trainer/loop", "recording_dynamics_leaves_the_weights_as_they_are"),
        _test("models/evaluation", "weights_statistics_and_mode_are_left_as_they_were"),
    )),
    ("A", "seeds are separate streams, requested = recorded", (
        _test("repro/seeds", "seeds_s_and_s_plus_1_are_unrelated"),
        _test("trainer/loop", "two_seeds_share_neither_initial_weights_nor_order"),
        _test("steps/training", "two_seeds_that_are_one_are_refused"),
    )),
    ("A", "a subset is a file of ids with a hash; same seed, same hash", (
        _test("cartography/subset", "the_hash_is_that_of_the_ids"),
        _test("steps/distill", "a_saved_subset_is_what_the_student_was_trained_on"),
    )),
    ("A", "a selection has exactly its budget, of distinct ids", (
        _test("cartography/selection", "every_strategy_returns_exactly_its_budget_of_distinct_ids"),
        _test("cartography/selection", "a_mixture_takes_its_shares_though_its_regions_overlap"),
    )),
    ("A", "ties are broken by seed; permuting the data permutes the selection", (
        _test("cartography/selection", "permuting_the_data_set_permutes_the_selection"),
        _test("cartography/selection", "ties_depend_on_the_seed_and_not_on_the_position"),
    )),
    ("A", "everything is keyed by example id and the fingerprints of data and split", (
        _test("cartography/log", "loading_with_another_split_raises_and_names_it"),
        _test("cartography/log", "positions_of_another_split_are_refused_by_their_labels"),
        _test("cartography/subset", "a_subset_of_another_data_set_is_refused"),
    )),
    ("A", "one factor differs at a time, and what differs is printed", (
        _test("steps/compare", "a_run_that_differs_in_more_than_the_factor_is_refused"),
        _test("repro/checks", "settings_that_differ_beside_the_factor_are_named"),
        _test("compare/differences", "objectives_are_compared_at_the_same_subset"),
    )),
    ("A", "one evaluator: counts summed, divided once", (
        _test("models/evaluation", "first_batch_all_wrong_and_second_all_right_is_one_half"),
    )),
    ("A", "the last epoch counts; a number without its checkpoint is refused", (
        _test("steps/compare", "a_number_without_its_checkpoint_is_refused"),
        _test("repro/checks", "a_checkpoint_that_is_missing_or_changed_is_named"),
    )),
    ("A", "budgets are exact, unknown keys are refused, seed 0 is a seed", (
        _test("trainer/loop", "every_budgeted_sample_is_seen_and_none_beside"),
        _test("study/load", "a_typo_in_a_key_gives_its_section_and_the_nearest_key"),
        _test("study/load", "seed_0_is_a_seed_not_an_absent_one"),
    )),
    ("A", "small images keep their resolution in the stem", (
        _test("steps/training", "every_run_says_where_its_weights_began"),
        _test("models/networks", "small_images_keep_their_resolution_in_the_stem_and_large_"
        "ones_do_not"),
    )),
    ("B", "train and test features are of the same weights; no probe below its floor", (
        _test("steps/probe", "test_features_of_an_untrained_network_are_refused"),
        _test("probes/classifiers", "all_probes_refuse_features_that_do_not_belong_together"),
        _test("repro/checks", "each_lie_is_stopped_by_its_check_alone"),
    )),
    ("B", "permuting teacher rows raises the loss, the gradient reaches the student, a copy is the "
     "minimum", (
        _test("trainer/feature_losses", "permuting_teacher_rows_raises_the_loss"),
        _test("trainer/feature_losses", "a_perfect_copy_is_the_minimum"),
        _test("trainer/logit_losses", "permuting_teacher_rows_raises_the_loss"),
    )),
    ("B", "no parameter with a gradient lies before the target", (
        _test("trainer/feature_losses", "the_gradient_reaches_the_student_and_only_the_student"),
    )),
    ("B", "grids are resized: a bright quadrant stays in its quadrant", (
        _test("trainer/feature_losses", "a_bright_quadrant_stays_in_its_quadrant"),
    )),
    ("B", "what is planned is what is seen, of every shard", (
        _test("dataset/plan", "random_shards_come_equally_often_over_200_passes"),
        _test("dataset/plan", "every_planned_example_is_seen_exactly_once_per_pass"),
        _test(
            "steps/training", "a_loader_that_draws_other_shards_than_planned_cannot_finish_a_run"
        ),
    )),
    ("B", "generators are private; the global ones are left as they were", (
        _test("repro/seeds", "global_generators_are_left_as_they_were"),
        _test("trainer/loop", "training_leaves_the_global_generators_as_they_were"),
        _test("structure", "no_module_unpickles_evaluates_or_touches_a_global_generator"),
    )),
    ("B", "identical views are refused", (
        _test("trainer/feature_losses", "identical_views_are_refused"),
    )),
    ("B", "isotropic features pass as such, constant ones fail", (
        _test("probes/diagnostics", "isotropic_random_features_pass_and_constant_ones_fail"),
    )),
    ("B", "the test features choose nothing: noise labels give chance", (
        _test("probes/classifiers", "probing_noise_labels_gives_chance_on_test"),
        _test("probes/classifiers", "the_chosen_c_does_not_depend_on_the_test_features"),
    )),
    ("B", "teacher outputs are keyed by teacher, example id and view", (
        _test("models/outputs", "another_teacher_is_refused_and_said"),
        _test("audit/report", "every_defect_is_caught_and_every_honest_number_passes"),
        _test("dataset/loader", "a_pass_sees_its_replayed_view_and_the_teacher_s_row_of_it"),
        _test("dataset/loader", "teacher_rows_are_those_of_their_examples"),
    )),
    ("B", "grids of features are of the view the student sees: they are not augmented afterwards", (
        _test("study/sections", "grids_of_features_are_of_the_views_the_student_sees"),
        _test("models/outputs", "outputs_of_other_views_are_refused_and_said"),
    )),
    ("B", "a resumed run is the uninterrupted one, bit for bit", (
        _test("trainer/resume", "stopped_and_resumed_run_leaves_the_bytes_of_an_uninterrupted_one"),
        _test("trainer/resume", "a_network_with_its_channels_last_resumes_to_the_bit"),
        _test("trainer/resume", "a_killed_process_goes_on_to_the_same_bytes"),
        _test("trainer/state", "a_state_of_other_settings_is_refused_with_the_difference"),
    )),
    ("B", "writes are atomic, shards carry checksums, cut ones are refused", (
        _test("cache/shards", "a_cut_shard_is_refused_wherever_it_is_cut"),
        _test("cache/shards", "a_changed_byte_is_found_by_verify"),
        _test("cache/build", "a_killed_builder_of_a_part_resumes_to_the_same_bytes"),
    )),
    ("both", "tables and figures are made from run records alone", (
        _test("pipeline", "figures_are_redrawn_from_the_records_alone"),
        _test("pages", "a_generated_part_is_what_the_committed_tables_say"),
    )),
)  # fmt: skip
