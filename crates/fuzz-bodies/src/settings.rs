//! `run.toml`, which a site gets from the coordinator.

use crate::memory::Bound;
use base::RunConfig;

/// A TOML value takes some hundred bytes of memory for a few of text, and the text is read twice; the table of known keys takes the rest.
const TOML: Bound = Bound { base_bytes: 4 << 20, per_byte: 512 };

/// The names and shapes of 4,096 layers, the most that a configuration may ask for.
const SCHEMA: Bound = Bound { base_bytes: 64 << 20, per_byte: 64 };

/// A configuration is the same when it is written and read again, and its tensors can be listed.
pub fn run_toml(bytes: &[u8]) {
    let Ok(text) = str::from_utf8(bytes) else { return };
    let Ok(config) = TOML.check(text.len(), || RunConfig::from_toml(text)) else { return };
    let again = RunConfig::from_toml(&config.to_toml()).expect("what was written can be read");
    assert_eq!(again, config);
    let schema = SCHEMA.check(text.len(), || config.schema());
    let fragments = schema.fragments(config.sync.fragments);
    assert_eq!(fragments.iter().map(|fragment| fragment.elements()).sum::<usize>(), schema.elements());
    assert!(config.rounds_total() > 0 && config.steps_per_round() > 0);
}
