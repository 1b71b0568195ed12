//! `run.toml` as `beringia init` writes it: every key of [`RunConfig`], with what it means.
//!
//! The comments stand in one table, from which the file and the list in `beringia init --help` are made. That
//! the table has exactly the keys that are read, and that the file parses back to what was written, are tests.

use base::RunConfig;
use base::transformers::TransformersSection;
use std::fmt::Write;

/// Column in which comments begin, where the setting leaves room.
const COMMENT_COLUMN: usize = 36;

/// Section, what it is about, and its keys with their meaning.
type Section = (&'static str, &'static str, &'static [(&'static str, &'static str)]);

const SECTIONS: [Section; 7] = [
    (
        "run",
        "What tells this run from others.",
        &[("name", "letters, digits, - and _"), ("seed", "of the initial weights and of the order of the data")],
    ),
    (
        "model",
        "Shape of the model, with the names of Hugging Face's LlamaConfig. Fixed once training has begun.",
        &[
            ("vocab_size", "tokens the model knows: those of data/tokenizer.json"),
            ("hidden_size", "width of the residual stream"),
            ("intermediate_size", "width inside the feed-forward layers"),
            ("num_hidden_layers", "transformer blocks"),
            ("num_attention_heads", "query heads; they divide hidden_size"),
            ("num_key_value_heads", "key and value heads; they divide the query heads"),
            ("max_position_embeddings", "longest text the model can look at, tokens"),
            ("rope_theta", "base of the rotary embedding's frequencies"),
            ("rms_norm_eps", "added to the mean square in RMSNorm"),
            ("tie_word_embeddings", "whether input and output embedding are one"),
        ],
    ),
    ("data", "How text becomes samples.", &[("sequence_length", "tokens predicted in one sample")]),
    (
        "train",
        "The inner loop.",
        &[
            ("batch_samples", "samples in one step, over all sites together"),
            ("micro_batch_samples", "samples computed at once; lower it to save memory"),
            ("steps", "inner steps of the whole run"),
            ("optimizer", "adamw, or sgd for proofs"),
            ("learning_rate", "the peak, reached after the warm-up"),
            ("warmup_steps", "steps over which it rises from 0"),
            ("learning_rate_final_fraction", "of the peak, reached along a cosine at the last step"),
            ("beta1", "AdamW: decay of the first moment"),
            ("beta2", "AdamW: decay of the second moment"),
            ("epsilon", "AdamW: added to the root of the second moment"),
            ("weight_decay", "AdamW: decoupled decay of matrices"),
            ("gradient_clip_norm", "larger gradients are scaled down to this norm; 0 never"),
        ],
    ),
    (
        "sync",
        "Rounds between sites; `beringia train` alone does not use them.",
        &[
            ("strategy", "synchronous: gradients at every step; diloco; streaming: while sites train on"),
            ("inner_steps", "steps between two merges of the same parameters"),
            ("fragments", "streaming: parts that are merged in turn"),
            ("overlap_steps", "streaming: steps made while a fragment travels"),
            ("mixing", "part of the local parameters that the global ones replace"),
            ("keep_overlapped", "whether what is learnt while a fragment travels stays"),
            ("codec", "f32, bf16, int8, mxfp4, e3m0, lowrank, sparse96 or sparse"),
            ("rank", "lowrank: columns of a factor"),
            ("adaptive", "streaming: H, fragments, overlap, codec and rank follow the measured links"),
            ("exchange", "mesh: every site fetches every delta; sharded: merges a part; auto: by the links"),
            (
                "merge",
                "mean: weighted by tokens; trimmed-mean: less the largest and smallest values, against false deltas",
            ),
            ("clip_norm", "mean: longer deltas are cut to so many times the median of the round's norms; 0 never"),
            ("keep_residual", "whether what coding lost stays in the site's own parameters"),
            ("error_feedback", "else: part of it that is added to the next delta"),
            ("outer_learning_rate", "step size of the outer Nesterov momentum"),
            ("outer_momentum", "its decay"),
            ("joint_second_moment", "AdamW steps as long as those of the batch of all sites"),
            ("sites", "sites to wait for before the first round"),
            ("shares", "fixed shares of the batch by site, e.g. [1.0, 2.0]; [] by measured speed"),
            ("quorum", "part of the sites that is enough to close a round; 1 waits for all"),
            ("grace_seconds", "longest wait for the others once a quorum has delivered"),
            ("deadline_seconds", "beyond a round's expected time, before a silent site is dropped"),
            (
                "recompute_share",
                "part of the steps made twice, against devices that now and then compute wrong; 0 none",
            ),
            ("witness_share", "part of those that another site with the same engine recomputes as well"),
        ],
    ),
    (
        "checkpoint",
        "Autosave.",
        &[("every_rounds", "rounds between two saves"), ("keep", "checkpoints kept, at least 2")],
    ),
    (
        "evaluate",
        "Validation while training.",
        &[
            ("every_rounds", "rounds between two validations"),
            ("samples_max", "most validation samples used each time"),
            ("sample_tokens", "tokens of text written after each validation; 0 for none"),
        ],
    ),
];

/// The whole file.
pub(crate) fn render(config: &RunConfig) -> String {
    let values: toml::Table =
        toml::from_str(&config.to_toml()).unwrap_or_else(|error| unreachable!("our own serialisation parses: {error}"));
    let mut text = String::from(
        "# Settings of a run of beringia. Every site must have the same; a key that is left out has its default.\n",
    );
    for (section, about, keys) in SECTIONS {
        text.push_str(&format!("\n# {about}\n[{section}]\n"));
        for (key, meaning) in keys {
            let setting = format!("{key} = {}", values[section][*key]);
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{setting:<COMMENT_COLUMN$}# {meaning}");
        }
        if let ("model", Some(transformers)) = (section, &config.transformers) {
            text.push_str(&render_transformers(transformers));
        }
    }
    text
}

/// The section that only a model other than Llama has.
fn render_transformers(section: &TransformersSection) -> String {
    let string = |text: &String| toml::Value::String(text.clone());
    let mut text =
        String::from("\n# Not a Llama: transformers builds it from this config.json, and PyTorch engines train it.\n");
    text.push_str(&format!("[transformers]\nconfig = {}\nparameters = [\n", string(&section.config)));
    for line in &section.parameters {
        text.push_str(&format!("    {},\n", string(line)));
    }
    text.push_str("]\n");
    text
}

/// The keys and their meanings, for `beringia init --help`.
pub(crate) fn keys_help() -> String {
    let mut text = String::from("Keys of run.toml:");
    for (section, about, keys) in SECTIONS {
        text.push_str(&format!("\n\n[{section}] {about}"));
        for (key, meaning) in keys {
            text.push_str(&format!("\n  {key:<30}{meaning}"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::ModelShape;
    use base::config::{InnerOptimizer, Strategy};

    fn config() -> RunConfig {
        let shape = ModelShape {
            vocab_size: 2_048,
            hidden_size: 128,
            intermediate_size: 352,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 256,
            rope_theta: 1e6,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
        };
        RunConfig::new("north-1", shape)
    }

    #[test]
    fn it_parses_back_to_what_was_written() {
        assert_eq!(RunConfig::from_toml(&render(&config())).unwrap(), config());
        let mut changed = config();
        changed.run.seed = i64::MAX as u64;
        changed.train.optimizer = InnerOptimizer::Sgd;
        changed.train.learning_rate = 1.0 / 3.0;
        changed.train.epsilon = 1e-30;
        changed.sync.strategy = Strategy::Synchronous;
        changed.sync.shares = vec![1.0, 2.0, 5.0];
        let parameters = vec!["wte.weight 512 x 64".to_owned(), "ln.weight 64".to_owned()];
        changed.transformers =
            Some(TransformersSection { config: "{\"model_type\": \"gpt2\"}\n".to_owned(), parameters });
        assert_eq!(RunConfig::from_toml(&render(&changed)).unwrap(), changed);
    }

    #[test]
    fn every_key_has_a_meaning_and_no_other() {
        let values: toml::Table = toml::from_str(&config().to_toml()).unwrap();
        let names = |pairs: &[(&str, &str)]| pairs.iter().map(|(key, _)| (*key).to_owned()).collect::<Vec<_>>();
        let described: Vec<_> = SECTIONS.iter().map(|(name, _, keys)| ((*name).to_owned(), names(keys))).collect();
        let read: Vec<_> = values
            .iter()
            .map(|(name, keys)| (name.clone(), keys.as_table().unwrap().keys().cloned().collect::<Vec<_>>()))
            .collect();
        let sorted = |mut sections: Vec<(String, Vec<String>)>| {
            sections.iter_mut().for_each(|(_, keys)| keys.sort());
            sections.sort();
            sections
        };
        assert_eq!(sorted(described), sorted(read));
    }
}
