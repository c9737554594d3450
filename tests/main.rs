//! The cluster as people and programs see it: real processes, real QUIC, real HTTP. A file's name is the sentence
//! that it proves; `harness` has the machines.

// Where something is not as a test expects, stopping is what it is for.
#![allow(clippy::unwrap_used)]

mod harness;

mod a_client_that_leaves_frees_its_slot;
mod a_far_server_answers_as_if_it_were_here;
mod a_far_server_that_goes_and_comes_is_followed;
mod a_guest_cannot_let_others_in;
mod a_killed_engine_ends_its_answers_in_typed_errors_and_starts_again;
mod a_killed_worker_node_is_reported_and_comes_back_by_itself;
mod a_machine_without_a_model_answers_with_the_others;
mod a_model_that_cannot_be_fetched_is_said;
mod a_node_that_ends_lets_answers_finish;
mod a_running_node_joins_and_keeps_its_model;
mod a_second_connection_disturbs_no_answer;
mod a_slow_reader_holds_up_nobody_else;
mod a_wrong_token_lets_nobody_in;
mod an_engine_ends_with_its_node;
mod bad_requests_are_told_what_is_wrong;
mod characters_never_split_across_chunks;
mod echo_is_never_the_default;
mod every_full_member_can_let_others_in;
mod impossible_starts_say_what_to_do;
mod nobody_without_a_certificate_gets_a_byte;
mod nodes_find_each_other_by_mdns;
mod one_request_has_one_trace_in_all_processes;
mod the_openai_client_library_works;
mod trouble_at_a_far_server_is_said_for_what_it_is;
mod two_nodes_of_one_name_are_told;
mod what_is_said_about_the_choice_of_tokens_holds_on_another_machine;
mod what_was_acknowledged_survives_kill_9;
