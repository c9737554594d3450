//! Workers: what turns a request into an answer.

pub mod engine_process;
