//! What must hold whatever bytes a peer sends or a file holds: one function for each parser, called by `cargo fuzz` (folder `fuzz/`) and,
//! over the same corpora and some thousand mutations of them, by an ordinary test.
//!
//! A body panics only where something is wrong:
//! - the parser panicked;
//! - it took more memory than the input can ask for ([`memory`]);
//! - what it accepted is another thing when it is written and read again;
//! - what it accepted is not what it promises (an index out of range, a number that is not finite, a path outside a folder).
//!
//! That a parser refuses what it should is not shown here but by the tests beside it. [docs/fuzzing.md](../../../docs/fuzzing.md) has the
//! commands and what was run.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a body's panic is its finding")]

pub mod checkpoints;
pub mod codecs;
pub mod coordination;
pub mod corpora;
pub mod datasets;
pub mod logs;
pub mod memory;
pub mod mutate;
pub mod network;
mod place;
pub mod plans;
pub mod settings;
pub mod torch;

/// A parser under test.
pub struct Target {
    /// Name of the function, of the fuzz target and of its folder of corpora.
    pub name: &'static str,
    /// What must hold.
    pub body: fn(&[u8]),
    /// Inputs that mean something, with a name each.
    pub seeds: fn() -> Vec<(&'static str, Vec<u8>)>,
    /// Mutations that the ordinary test tries: fewer where one takes long.
    pub mutations: usize,
}

/// Lists targets by module and function.
macro_rules! targets {
    ($($module:ident :: $body:ident, $seeds:ident, $mutations:literal;)*) => {
        /// Every parser.
        pub const TARGETS: &[Target] = &[$(
            Target {
                name: stringify!($body),
                body: $module::$body,
                seeds: corpora::$seeds,
                mutations: $mutations,
            },
        )*];
    };
}

targets! {
    network::frames, frames, 2_000;
    network::preamble, preamble, 500;
    network::tls_of_a_stranger, tls_of_a_stranger, 500;
    network::tls_of_a_server, tls_of_a_server, 200;
    network::greeting, greeting, 2_000;
    network::from_coordinator, from_coordinator, 4_000;
    network::from_site, from_site, 4_000;
    network::chunk_messages, chunk_messages, 2_000;
    network::chunk_answers, chunk_answers, 2_000;
    network::probe_messages, probe_messages, 2_000;
    network::blob_name, blob_name, 1_000;
    network::invite, invite, 2_000;
    network::proxy, proxy, 1_000;
    network::identity, identity, 500;
    network::unpacked, unpacked, 500;
    network::partial_file, partial_file, 50;
    network::object_name, object_name, 1_000;
    codecs::block_codecs, block_codecs, 3_000;
    codecs::sparse_codecs, sparse_codecs, 3_000;
    codecs::low_rank, low_rank, 1_000;
    codecs::fragment_delta, fragment_delta, 1_000;
    checkpoints::tensors, tensors, 2_000;
    checkpoints::checkpoint_manifest, checkpoint_manifest, 300;
    checkpoints::hugging_face_config, hugging_face_config, 500;
    checkpoints::hugging_face_index, hugging_face_index, 300;
    checkpoints::hugging_face_weights, hugging_face_weights, 300;
    datasets::data_manifest, data_manifest, 2_000;
    datasets::shard_file, shard_file, 200;
    datasets::tokenizer, tokenizer, 300;
    datasets::text_file, text_file, 500;
    datasets::json_lines, json_lines, 500;
    datasets::parquet_file, parquet_file, 300;
    settings::run_toml, run_toml, 500;
    coordination::coordinator_hears, coordinator_hears, 2_000;
    coordination::site_hears, site_hears, 2_000;
    coordination::log_lines, log_lines, 300;
    coordination::log_database, log_database, 30;
    coordination::access_files, access_files, 500;
    logs::event_log, event_log, 300;
    plans::cluster, cluster, 1_000;
    plans::device_catalogue, device_catalogue, 200;
    plans::layout_table, layout_table, 300;
    plans::command_texts, command_texts, 2_000;
    torch::torch_answers, torch_answers, 2_000;
}

/// The target of that name.
pub fn target(name: &str) -> Option<&'static Target> {
    TARGETS.iter().find(|target| target.name == name)
}

/// For targets whose parser contains the panics of a library that it uses: cargo-fuzz would end the process at each. One that is not
/// contained still ends it.
pub fn let_contained_panics_pass() {
    std::panic::set_hook(Box::new(|_| {}));
}
