//! The cluster as people and programs see it: real processes, real QUIC, real HTTP. A file's name is the sentence
//! that it proves; `harness` has the machines.

// Where something is not as a test expects, stopping is what it is for.
#![allow(clippy::unwrap_used)]

mod harness;

mod a_changed_context_length_moves_over_without_a_failed_request;
mod a_changed_limit_holds_for_the_next_answer_of_the_same_engine;
mod a_client_that_leaves_frees_its_slot;
mod a_drained_node_loses_no_answer;
mod a_guest_cannot_let_others_in;
mod a_hung_worker_is_noticed_and_its_answers_move;
mod a_killed_worker_node_is_reported_and_comes_back_by_itself;
mod a_machine_without_a_model_answers_with_the_others;
mod a_model_that_cannot_be_fetched_is_said;
mod a_node_that_ends_lets_answers_finish;
mod a_refused_parameter_changes_nothing;
mod a_running_node_joins_and_keeps_its_model;
mod a_script_does_not_starve_a_person;
mod a_second_connection_disturbs_no_answer;
mod a_slow_reader_holds_up_nobody_else;
mod a_stream_outlives_its_machine;
mod a_wrong_token_lets_nobody_in;
mod an_engine_ends_with_its_node;
mod an_engine_that_restarts_finishes_its_answers_first;
mod answers_go_on_when_their_engine_is_killed;
mod bad_requests_are_told_what_is_wrong;
mod characters_never_split_across_chunks;
mod echo_is_never_the_default;
mod every_full_member_can_let_others_in;
mod explain_says_who_was_asked_and_why;
mod impossible_starts_say_what_to_do;
mod nobody_without_a_certificate_gets_a_byte;
mod nodes_find_each_other_by_mdns;
mod one_request_has_one_trace_in_all_processes;
mod the_openai_client_library_works;
mod tools_are_called_from_any_machine;
mod two_nodes_of_one_name_are_told;
mod what_is_said_about_the_choice_of_tokens_holds_on_another_machine;
mod what_was_acknowledged_survives_kill_9;
mod what_was_set_survives_kill_9;
