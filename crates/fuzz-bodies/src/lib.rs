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
    network::frames, frames, 10_000;
    network::preamble, preamble, 2_500;
    network::tls_of_a_stranger, tls_of_a_stranger, 2_500;
    network::tls_of_a_server, tls_of_a_server, 1_000;
    network::greeting, greeting, 10_000;
    network::from_coordinator, from_coordinator, 20_000;
    network::from_site, from_site, 20_000;
    network::chunk_messages, chunk_messages, 10_000;
    network::chunk_answers, chunk_answers, 10_000;
    network::probe_messages, probe_messages, 10_000;
    network::blob_name, blob_name, 5_000;
    network::invite, invite, 10_000;
    network::proxy, proxy, 5_000;
    network::identity, identity, 2_500;
    network::unpacked, unpacked, 2_500;
    network::partial_file, partial_file, 250;
    network::object_name, object_name, 5_000;
    codecs::block_codecs, block_codecs, 15_000;
    codecs::sparse_codecs, sparse_codecs, 15_000;
    codecs::low_rank, low_rank, 5_000;
    codecs::fragment_delta, fragment_delta, 5_000;
    checkpoints::tensors, tensors, 10_000;
    checkpoints::checkpoint_manifest, checkpoint_manifest, 1_500;
    checkpoints::hugging_face_config, hugging_face_config, 2_500;
    checkpoints::hugging_face_index, hugging_face_index, 1_500;
    checkpoints::hugging_face_weights, hugging_face_weights, 1_500;
    datasets::data_manifest, data_manifest, 10_000;
    datasets::shard_file, shard_file, 1_000;
    datasets::tokenizer, tokenizer, 1_500;
    datasets::text_file, text_file, 2_500;
    datasets::json_lines, json_lines, 2_500;
    datasets::parquet_file, parquet_file, 1_500;
    settings::run_toml, run_toml, 2_500;
    coordination::coordinator_hears, coordinator_hears, 10_000;
    coordination::site_hears, site_hears, 10_000;
    coordination::log_lines, log_lines, 1_500;
    coordination::log_database, log_database, 150;
    coordination::access_files, access_files, 2_500;
    logs::event_log, event_log, 1_500;
    plans::cluster, cluster, 5_000;
    plans::device_catalogue, device_catalogue, 1_000;
    plans::layout_table, layout_table, 1_500;
    plans::command_texts, command_texts, 10_000;
    torch::torch_answers, torch_answers, 10_000;
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
