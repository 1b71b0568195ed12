//! Shapes of models: some well-known ones by name, any other by its number of parameters.

use crate::model::shape::Transformer;
use base::Hint;

/// Tokens of a sequence where none are given.
const SEQUENCE: f64 = 4_096.0;

/// Least and greatest number of parameters for which a shape is made.
const PARAMETERS: (f64, f64) = (1e6, 1e14);

/// Vocabulary of a model of fewer parameters than so many: a small model of a large vocabulary would be all embedding.
const VOCABULARIES: &[(f64, f64)] = &[(1e7, 1_024.0), (1e8, 8_192.0), (5e8, 32_000.0)];

/// Parameters below which any number of layers does: four at a time would miss the size.
const SMALL: f64 = 1e8;

/// Name, layers, width, feed-forward, heads, key-value heads, vocabulary, experts, experts a token, gated.
type Known = (&'static str, f64, f64, f64, f64, f64, f64, f64, f64, bool);

/// From the models' own configurations on Hugging Face; `deepseek-v3-671b` is explained at [`named`].
const KNOWN: &[Known] = &[
    ("llama-3.2-1b", 16.0, 2048.0, 8192.0, 32.0, 8.0, 128_256.0, 1.0, 1.0, true),
    ("llama-3-8b", 32.0, 4096.0, 14_336.0, 32.0, 8.0, 128_256.0, 1.0, 1.0, true),
    ("llama-3-70b", 80.0, 8192.0, 28_672.0, 64.0, 8.0, 128_256.0, 1.0, 1.0, true),
    ("llama-3-405b", 126.0, 16_384.0, 53_248.0, 128.0, 8.0, 128_256.0, 1.0, 1.0, true),
    ("qwen2.5-32b", 64.0, 5120.0, 27_648.0, 40.0, 8.0, 152_064.0, 1.0, 1.0, true),
    ("mixtral-8x7b", 32.0, 4096.0, 14_336.0, 32.0, 8.0, 32_000.0, 8.0, 2.0, true),
    ("deepseek-v3-671b", 60.0, 7168.0, 2048.0, 56.0, 46.0, 129_280.0, 256.0, 9.0, true),
    ("gpt3-175b", 96.0, 12_288.0, 49_152.0, 96.0, 96.0, 50_257.0, 1.0, 1.0, false),
    ("intellect-1-10b", 42.0, 4096.0, 14_336.0, 32.0, 8.0, 128_256.0, 1.0, 1.0, true),
    ("gpt-1t", 128.0, 25_600.0, 102_400.0, 160.0, 160.0, 51_200.0, 1.0, 1.0, false),
];

/// Why there is no such model.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ModelNameError {
    /// Neither a name nor a number.
    #[error("\"{found}\" is neither a model that is known nor a number of parameters")]
    Unknown {
        /// What was given.
        found: String,
        /// The nearest name.
        near: Option<&'static str>,
    },
    /// A number that no model has.
    #[error("{found:e} parameters: {least:e} to {most:e} can be planned", least = PARAMETERS.0, most = PARAMETERS.1)]
    Absurd {
        /// What was given.
        found: f64,
    },
}

impl Hint for ModelNameError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unknown { near: Some(near), .. } => {
                format!("did you mean \"{near}\"? A number such as 70B does as well")
            }
            Self::Unknown { .. } => format!("give a number such as 70B, or one of {}", names().join(", ")),
            Self::Absurd { .. } => "write 70B for seventy billion".to_owned(),
        })
    }
}

/// Names that [`parse`] knows.
pub fn names() -> Vec<&'static str> {
    KNOWN.iter().map(|known| known.0).collect()
}

/// A model by its name, or a Llama of so many parameters ("70B", "1.3e9").
///
/// # Errors
/// Neither a known name nor a number, or a number that no model has.
pub fn parse(text: &str) -> Result<Transformer, ModelNameError> {
    let text = text.trim();
    if let Some(shape) = named(text) {
        return Ok(shape);
    }
    let unknown = || ModelNameError::Unknown { found: text.chars().take(40).collect(), near: nearest(text) };
    let parameters = crate::units::parse_count(text).ok_or_else(unknown)?;
    if !(PARAMETERS.0..=PARAMETERS.1).contains(&parameters) {
        return Err(ModelNameError::Absurd { found: parameters });
    }
    Ok(llama_of(parameters))
}

/// A known model. DeepSeek-V3's latent attention is replaced by a grouped one of as many parameters (46 of 56 heads with keys of their own),
/// its shared expert by a ninth routed one, and its 58 layers with experts and 3 without by 60 alike: 1.5 % more parameters than it has, 2 % fewer active.
fn named(text: &str) -> Option<Transformer> {
    let (_, layers, hidden, ffn, heads, kv_heads, vocab, experts, experts_per_token, gated) =
        *KNOWN.iter().find(|known| known.0.eq_ignore_ascii_case(text))?;
    Some(Transformer { layers, hidden, ffn, heads, kv_heads, vocab, seq: SEQUENCE, experts, experts_per_token, gated })
}

fn nearest(text: &str) -> Option<&'static str> {
    let text: String = text.to_lowercase().chars().take(80).collect();
    let scored = names().into_iter().map(|name| (strsim::jaro_winkler(&text, name), name));
    let best = scored.max_by(|left, right| left.0.total_cmp(&right.0));
    best.filter(|(similarity, _)| *similarity > 0.7).map(|(_, name)| name)
}

/// The Llama nearest to so many parameters: heads of 128, feed-forward of 3.5 widths, a layer for each 102 of width (as Llama 3's 80 of 8,192).
fn llama_of(parameters: f64) -> Transformer {
    let shape = |hidden: f64, layers: f64| Transformer {
        layers,
        hidden,
        ffn: (3.5 * hidden / 256.0).round().max(1.0) * 256.0,
        heads: hidden / 128.0,
        kv_heads: (hidden / 128.0).min(8.0),
        vocab: VOCABULARIES.iter().find(|(below, _)| parameters < *below).map_or(128_256.0, |(_, vocab)| *vocab),
        seq: SEQUENCE,
        experts: 1.0,
        experts_per_token: 1.0,
        gated: true,
    };
    let off = |shape: &Transformer| (shape.parameters() / parameters).ln().abs();
    let widths = (1..=1_024).map(|heads| f64::from(heads) * 128.0);
    let depths = |hidden: f64| -> Vec<f64> {
        let ideal = hidden / 102.4;
        if parameters < SMALL {
            return (1..=16).map(f64::from).collect();
        }
        [0.75, 0.85, 1.0, 1.15, 1.3].map(|factor| (ideal * factor / 4.0).round().max(1.0) * 4.0).to_vec()
    };
    let with_layers = widths.flat_map(|hidden| depths(hidden).into_iter().map(move |layers| shape(hidden, layers)));
    let nearest = with_layers.reduce(|best, next| if off(&next) < off(&best) { next } else { best });
    nearest.unwrap_or_else(|| unreachable!("there are widths"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_models_have_the_parameters_of_their_names() {
        // The output projection is counted once with the embedding, which Llama 3 has twice.
        let wanted = [1.24e9, 7.5e9, 69.5e9, 403.7e9, 32e9, 46.6e9, 671e9, 175e9, 9.7e9, 1008e9];
        for (name, wanted) in names().into_iter().zip(wanted) {
            let found = parse(name).unwrap().parameters();
            assert!((found / wanted - 1.0).abs() < 0.03, "{name}: {found:e}");
        }
        let active = parse("deepseek-v3-671b").unwrap().active_parameters();
        assert!((active / 37e9 - 1.0).abs() < 0.03, "{active:e}");
    }

    #[test]
    fn a_number_makes_a_llama_of_that_size() {
        for exponent in 60..=140 {
            let wanted = 10_f64.powf(f64::from(exponent) / 10.0);
            let found = parse(&format!("{wanted}")).unwrap();
            assert!((found.parameters() / wanted - 1.0).abs() < 0.2, "{wanted:e}: {found:?}");
            assert_eq!(found.hidden % found.heads, 0.0);
        }
    }

    #[test]
    fn misspelt_and_absurd_models_are_refused() {
        let error = parse("llama-3-70").unwrap_err();
        assert_eq!(error.to_string(), "\"llama-3-70\" is neither a model that is known nor a number of parameters");
        assert_eq!(error.hint().as_deref(), Some("did you mean \"llama-3-70b\"? A number such as 70B does as well"));
        assert_eq!(parse("70").unwrap_err().to_string(), "7e1 parameters: 1e6 to 1e14 can be planned");
        assert!(parse("-7B").is_err() && parse("NaN").is_err() && parse("infB").is_err());
    }
}
