//! Text from a model: one token after the other, drawn from the softmax of the last position's logits.
//!
//! ```text
//! p(token) = exp(logit / temperature) / Σ over the k largest logits      temperature 0: the largest
//! ```
//! Every token costs a forward pass over the text so far (at most `sequence_length` tokens of it): no keys and values are kept
//! between tokens. That suits the few lines that show how a run is doing; it is not an inference server.

use base::Hint;
use base::random::Random;
use data::{TextTokenizer, TokenizerError};
use engine::{Engine, EngineError};

/// Stream of [`Random`] that sampling draws from.
const SAMPLING_STREAM: u64 = 0x5A3B_1E00;
/// Most tokens over which one character may be spread before its pieces are shown as they are: UTF-8 has four bytes,
/// and the context before them is one token.
const UNFINISHED_TOKENS_MAX: usize = 5;

/// How text is drawn.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Most tokens drawn; an end of text ends it before.
    pub tokens: usize,
    /// 0 takes the likeliest token; 1 draws from the model's own distribution.
    pub temperature: f64,
    /// Only the k likeliest tokens can be drawn; 0 allows all.
    pub top_k: usize,
    /// Equal seeds give equal text.
    pub seed: u64,
}

impl Default for SampleOptions {
    fn default() -> Self {
        Self { tokens: 100, temperature: 0.8, top_k: 40, seed: 1 }
    }
}

/// Why there is no more text.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SamplingError {
    /// The engine refused or failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Tokens that are no text.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// A logit that is not a number.
    #[error("the model's logits are not finite numbers")]
    NotFinite,
    /// A temperature that is none.
    #[error("a temperature of {0} is not a number of 0 or more")]
    Temperature(f64),
}

impl Hint for SamplingError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Engine(error) => error.hint(),
            Self::Tokenizer(error) => error.hint(),
            Self::NotFinite => Some("the model is damaged: use an earlier checkpoint".to_owned()),
            Self::Temperature(_) => Some("use a temperature between 0 and 2, such as 0.8".to_owned()),
        }
    }
}

/// Continues `prompt` (an empty one starts a document) and gives `on_text` every piece of whole characters as it comes.
/// The model sees the last `sequence_length` tokens. Returns the tokens that were drawn.
///
/// # Errors
/// See [`SamplingError`]; what `on_text` was given stands.
pub fn sample(
    engine: &mut dyn Engine,
    tokenizer: &TextTokenizer,
    prompt: &[u32],
    options: &SampleOptions,
    sequence_length: usize,
    on_text: &mut dyn FnMut(&str),
) -> Result<Vec<u32>, SamplingError> {
    if !(options.temperature.is_finite() && options.temperature >= 0.0) {
        return Err(SamplingError::Temperature(options.temperature));
    }
    let mut tokens = if prompt.is_empty() { vec![tokenizer.end_of_text()] } else { prompt.to_vec() };
    let start = tokens.len();
    let mut random = Random::new(options.seed, SAMPLING_STREAM);
    let mut text = TextStream::new(tokenizer, &tokens);
    for _ in 0..options.tokens {
        let seen = &tokens[tokens.len().saturating_sub(sequence_length.max(1))..];
        let logits = engine.logits(seen)?;
        let token = draw(&logits[logits.len() - logits.len() / seen.len()..], options, &mut random)?;
        if token == tokenizer.end_of_text() {
            break;
        }
        tokens.push(token);
        text.push(token, on_text)?;
    }
    text.finish(on_text)?;
    Ok(tokens.split_off(start))
}

/// As [`sample`], all at once: the text that follows `prompt`.
///
/// # Errors
/// See [`SamplingError`].
pub fn sample_text(
    engine: &mut dyn Engine,
    tokenizer: &TextTokenizer,
    prompt: &[u32],
    options: &SampleOptions,
    sequence_length: usize,
) -> Result<String, SamplingError> {
    let mut text = String::new();
    sample(engine, tokenizer, prompt, options, sequence_length, &mut |piece| text.push_str(piece))?;
    Ok(text)
}

/// One token from the logits of one position.
fn draw(logits: &[f32], options: &SampleOptions, random: &mut Random) -> Result<u32, SamplingError> {
    if logits.iter().any(|logit| !logit.is_finite()) {
        return Err(SamplingError::NotFinite);
    }
    let mut candidates: Vec<u32> = (0..logits.len() as u32).collect();
    let logit = |token: u32| logits[token as usize];
    // Equal logits in the order of their tokens: the same choice on every platform.
    let likelier = |a: &u32, b: &u32| logit(*b).total_cmp(&logit(*a)).then(a.cmp(b));
    let wanted = if options.temperature == 0.0 { 1 } else { options.top_k };
    if (1..candidates.len()).contains(&wanted) {
        candidates.select_nth_unstable_by(wanted - 1, likelier);
        candidates.truncate(wanted);
    }
    candidates.sort_unstable_by(likelier);
    if candidates.len() == 1 {
        return Ok(candidates[0]);
    }
    let largest = f64::from(logit(candidates[0]));
    let weight = |token: &u32| ((f64::from(logit(*token)) - largest) / options.temperature).exp();
    let weights: Vec<f64> = candidates.iter().map(weight).collect();
    let mut left = random.next_unit() * weights.iter().sum::<f64>();
    for (token, weight) in candidates.iter().zip(&weights) {
        left -= weight;
        if left < 0.0 {
            return Ok(*token);
        }
    }
    // Only rounding leads here: the draw was all but the whole sum.
    Ok(candidates[candidates.len() - 1])
}

/// Tokens to text, piece by piece: a piece is shown when it ends with a whole character.
///
/// Decoders may treat the first token of a text differently (SentencePiece drops its space), so every piece is
/// decoded behind the one before it.
struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    /// The piece before, which was shown, and what has come since.
    pending: Vec<u32>,
    shown: usize,
}

impl<'a> TextStream<'a> {
    fn new(tokenizer: &'a TextTokenizer, prompt: &[u32]) -> Self {
        let pending = prompt[prompt.len().saturating_sub(1)..].to_vec();
        Self { tokenizer, shown: pending.len(), pending }
    }

    fn push(&mut self, token: u32, on_text: &mut dyn FnMut(&str)) -> Result<(), TokenizerError> {
        self.pending.push(token);
        let whole = self.tokenizer.decode(&self.pending)?;
        let unfinished = whole.ends_with(char::REPLACEMENT_CHARACTER);
        if !unfinished || self.pending.len() - self.shown >= UNFINISHED_TOKENS_MAX {
            self.show(&whole, on_text)?;
        }
        Ok(())
    }

    fn finish(&mut self, on_text: &mut dyn FnMut(&str)) -> Result<(), TokenizerError> {
        if self.pending.len() == self.shown {
            return Ok(());
        }
        let whole = self.tokenizer.decode(&self.pending)?;
        self.show(&whole, on_text)
    }

    fn show(&mut self, whole: &str, on_text: &mut dyn FnMut(&str)) -> Result<(), TokenizerError> {
        let before = self.tokenizer.decode(&self.pending[..self.shown])?;
        // Where the piece before ended in the middle of a character, it now reads otherwise: show it from there.
        let before = before.trim_end_matches(char::REPLACEMENT_CHARACTER);
        if let Some(piece) = whole.strip_prefix(before).filter(|piece| !piece.is_empty()) {
            on_text(piece);
        }
        self.pending.drain(..self.shown);
        self.shown = self.pending.len();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(temperature: f64, top_k: usize) -> SampleOptions {
        SampleOptions { tokens: 8, temperature, top_k, seed: 1 }
    }

    #[test]
    fn frequencies_follow_the_softmax_of_the_likeliest() {
        let logits = [1.0, 3.0, 2.0, -1.0];
        let mut random = Random::new(1, 2);
        let mut counts = [0u32; 4];
        const DRAWS: u32 = 20_000;
        for _ in 0..DRAWS {
            counts[draw(&logits, &options(0.5, 3), &mut random).unwrap() as usize] += 1;
        }
        let weights = [1.0, 3.0, 2.0].map(|logit: f64| (logit / 0.5).exp());
        for (token, weight) in weights.iter().enumerate() {
            let expected = weight / weights.iter().sum::<f64>();
            let found = f64::from(counts[token]) / f64::from(DRAWS);
            // Standard error at most 0.5 / sqrt(20,000) = 0.0035; five of them.
            assert!((found - expected).abs() < 0.018, "token {token}: {found} where {expected} was expected");
        }
        assert_eq!(counts[3], 0, "beyond the three likeliest");
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_largest() {
        let mut random = Random::new(1, 2);
        assert_eq!(draw(&[0.0, 5.0, 5.0, 1.0], &options(0.0, 0), &mut random).unwrap(), 1);
        assert_eq!(random, Random::new(1, 2), "nothing was drawn");
        assert!(matches!(draw(&[0.0, f32::NAN], &options(0.0, 0), &mut random), Err(SamplingError::NotFinite)));
    }

    /// A byte-level tokenizer that knows the 256 bytes and no merge: every character but ASCII is several tokens.
    fn byte_tokenizer() -> TextTokenizer {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("text.txt"), "to be or not to be").unwrap();
        let corpus = data::Corpus::folder(folder.path()).unwrap();
        TextTokenizer::train(&corpus, data::tokenizer::VOCABULARY_SIZE_MIN).unwrap()
    }

    #[test]
    fn pieces_are_whole_characters_and_add_up() {
        let tokenizer = byte_tokenizer();
        let text = "naïve 日本語 🌉 end";
        let tokens = tokenizer.encode(text).unwrap();
        let mut pieces = Vec::new();
        let mut stream = TextStream::new(&tokenizer, &tokenizer.encode("x").unwrap());
        for token in &tokens {
            stream.push(*token, &mut |piece| pieces.push(piece.to_owned())).unwrap();
        }
        stream.finish(&mut |piece| pieces.push(piece.to_owned())).unwrap();
        assert_eq!(pieces.concat(), text);
        assert_eq!(pieces.len(), text.chars().count());
    }

    #[test]
    fn bytes_that_are_no_text_do_not_hold_back_the_rest() {
        let tokenizer = byte_tokenizer();
        let lead = tokenizer.encode("日").unwrap()[0];
        let mut shown = String::new();
        let mut stream = TextStream::new(&tokenizer, &[]);
        for token in std::iter::repeat_n(lead, 40).chain(tokenizer.encode("end").unwrap()) {
            stream.push(token, &mut |piece| shown.push_str(piece)).unwrap();
        }
        stream.finish(&mut |piece| shown.push_str(piece)).unwrap();
        assert!(shown.ends_with("end") && shown.contains(char::REPLACEMENT_CHARACTER), "{shown}");
    }
}
