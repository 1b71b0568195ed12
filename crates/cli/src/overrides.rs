//! `--set section.key=value`: settings of a new run that differ from what `beringia init` would choose.
//!
//! A setting is checked as if it stood in `run.toml`: an unknown key is refused with the near one, a value of another
//! type or out of its range with what is wrong.

use base::RunConfig;
use base::config::ConfigError;
use std::str::FromStr;

/// One `section.key=value`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Override {
    section: String,
    key: String,
    value: toml::Value,
}

impl FromStr for Override {
    type Err = String;

    /// The value is read as in TOML; what is no TOML value is a text, so that `--set run.name=north` needs no quotes.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once('=').and_then(|(path, value)| Some((path.trim().split_once('.')?, value.trim())));
        let Some(((section, key), value)) = parts else {
            return Err("section.key=value is expected, as in train.steps=100".to_owned());
        };
        let parsed = toml::from_str::<toml::Table>(&format!("value = {value}")).ok();
        let value = parsed.and_then(|mut table| table.remove("value")).unwrap_or_else(|| value.into());
        Ok(Self { section: section.to_owned(), key: key.to_owned(), value })
    }
}

/// Whether a run that begins with `config` may have these settings.
///
/// # Errors
/// An unknown key, a value of another type or out of its range.
pub(crate) fn check(config: &RunConfig, overrides: &[Override]) -> Result<(), ConfigError> {
    RunConfig::from_toml(&merge(config, overrides).to_string()).map(drop)
}

/// Changes `config` by settings that were checked; ranges that depend on others are still to be validated.
pub(crate) fn apply(config: &mut RunConfig, overrides: &[Override]) {
    let merged = merge(config, overrides).try_into();
    *config = merged.unwrap_or_else(|error| unreachable!("keys and types were checked: {error}"));
}

fn merge(config: &RunConfig, overrides: &[Override]) -> toml::Table {
    let mut table: toml::Table =
        toml::from_str(&config.to_toml()).unwrap_or_else(|error| unreachable!("our own serialisation parses: {error}"));
    for Override { section, key, value } in overrides {
        let section = table.entry(section.as_str()).or_insert_with(|| toml::Table::new().into());
        if let Some(section) = section.as_table_mut() {
            section.insert(key.clone(), value.clone());
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::init::Size;
    use base::Hint;

    fn changed(text: &str) -> Result<RunConfig, ConfigError> {
        let (mut config, overrides) = (Size::Million1.config("x", 300), [text.parse().unwrap()]);
        check(&config, &overrides)?;
        apply(&mut config, &overrides);
        Ok(config)
    }

    #[test]
    fn values_of_every_type_are_set() {
        assert_eq!(changed("train.steps=7").unwrap().train.steps, 7);
        assert_eq!(changed("run.name=north").unwrap().run.name, "north");
        assert_eq!(changed("run.name=\"north\"").unwrap().run.name, "north");
        assert_eq!(changed("sync.shares = [1.0, 2.5]").unwrap().sync.shares, [1.0, 2.5]);
        assert!(!changed("model.tie_word_embeddings=false").unwrap().model.tie_word_embeddings);
    }

    #[test]
    fn what_run_toml_would_not_take_is_refused() {
        assert_eq!(changed("train.stebs=7").unwrap_err().hint().unwrap(), "did you mean 'steps'?");
        assert_eq!(changed("trian.steps=7").unwrap_err().hint().unwrap(), "did you mean 'train'?");
        assert!(matches!(changed("train.steps=many"), Err(ConfigError::Syntax(_))));
        assert!(matches!(changed("train.steps=0"), Err(ConfigError::Value { .. })));
        for text in ["train.steps", "steps=7", ""] {
            assert!(text.parse::<Override>().is_err(), "{text}");
        }
    }
}
