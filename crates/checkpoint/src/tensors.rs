//! Named f32 tensors as safetensors bytes, streamed in both directions.
//!
//! The layout is that of the format's own writer (8 bytes header length, JSON header padded to 8 bytes, then the
//! tensors in order of name), so equal tensors give equal bytes and equal hashes on every machine. The `safetensors`
//! crate writes and checks the header; this file moves the numbers, one buffer at a time, because a checkpoint
//! must not need a second copy of the model in memory.

use base::{Hint, HostTensor, NamedTensors};
use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};
use std::collections::HashMap;
use std::io::{self, Read, Write};

/// Bytes moved at once: large enough that system calls do not count, small beside any model.
const BUFFER_BYTES: usize = 1 << 20;
/// Bytes of the little-endian header length.
const LENGTH_BYTES: usize = 8;

/// How much a reader accepts, so that a hostile or damaged file cannot ask for unbounded memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReaderBounds {
    /// Longest JSON file (manifest, state, configuration, shard index), bytes.
    pub json_bytes_max: u64,
    /// Longest safetensors header, bytes.
    pub header_bytes_max: u64,
    /// Largest safetensors file, bytes.
    pub file_bytes_max: u64,
    /// Most files in one checkpoint or shards in one model.
    pub files_max: usize,
}

impl Default for ReaderBounds {
    fn default() -> Self {
        Self {
            // A state of 10,000 sites with 1,000 leases of about 6 bytes each.
            json_bytes_max: 64 << 20,
            // About 120 bytes a tensor: 100,000 tensors, a hundred times a 70B Llama's 723.
            header_bytes_max: 16 << 20,
            // 2^40 bytes: 275 G parameters in f32.
            file_bytes_max: 1 << 40,
            // The largest published models come in fewer than 500 shards.
            files_max: 4_096,
        }
    }
}

/// Why bytes are not tensors, or tensors cannot become bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TensorsError {
    /// The header or the sizes contradict each other.
    #[error("not a safetensors file: {reason}")]
    Format {
        /// The contradiction, with its numbers.
        reason: String,
    },
    /// More than [`ReaderBounds`] allows.
    #[error("{what} has {found} bytes, at most {maximum} are accepted")]
    TooLarge {
        /// `header` or `file`
        what: &'static str,
        /// Bytes announced.
        found: u64,
        /// The bound.
        maximum: u64,
    },
    /// A tensor that cannot be used here.
    #[error("tensor '{name}': {reason}")]
    Tensor {
        /// Its name.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// Reading or writing failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl Hint for TensorsError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Format { .. } | Self::Io(_) => "fetch or copy the file again and compare its hash".to_owned(),
            Self::TooLarge { .. } => "check that this is the file you meant".to_owned(),
            Self::Tensor { .. } => "check that the file belongs to this model and that its shapes agree".to_owned(),
        })
    }
}

/// What to do with one tensor of a file, decided from its header alone, before any memory is taken.
pub(crate) enum Choice {
    Read,
    Ignore,
    Refuse(String),
}

/// Which number formats a reader converts to f32.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Formats {
    /// What checkpoints hold.
    OnlyF32,
    /// What published models hold; both conversions to f32 are exact.
    F32Bf16F16,
}

/// The safetensors bytes of `tensors`; equal tensors give equal bytes.
///
/// # Errors
/// A tensor whose shape does not multiply out to its number of elements.
pub fn encode_tensors(tensors: &NamedTensors) -> Result<Vec<u8>, TensorsError> {
    let header = header_bytes(tensors, None)?;
    let mut bytes = Vec::with_capacity(encoded_len(&header, tensors));
    write_tensors(&mut bytes, &header, tensors)?;
    Ok(bytes)
}

/// Reads what [`encode_tensors`] wrote, within the default [`ReaderBounds`].
///
/// # Errors
/// Anything that is not exactly one safetensors file of f32 tensors.
pub fn decode_tensors(bytes: &[u8]) -> Result<NamedTensors, TensorsError> {
    let mut rest = bytes;
    read_tensors(&mut rest, bytes.len() as u64, &ReaderBounds::default(), Formats::OnlyF32, |_, _| Choice::Read)
}

/// Length prefix and padded JSON header of a file that holds `tensors`. `format` becomes the metadata entry
/// `format`, which `transformers` asks for.
pub(crate) fn header_bytes(tensors: &NamedTensors, format: Option<&str>) -> Result<Vec<u8>, TensorsError> {
    let mut offset = 0;
    let mut infos = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let elements = tensor.shape.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        if elements != Some(tensor.values.len()) {
            let reason = format!("shape {:?} with {} elements", tensor.shape, tensor.values.len());
            return Err(TensorsError::Tensor { name: name.clone(), reason });
        }
        let end = offset + size_of_val(tensor.values.as_slice());
        infos.push((
            name.clone(),
            TensorInfo { dtype: Dtype::F32, shape: tensor.shape.clone(), data_offsets: (offset, end) },
        ));
        offset = end;
    }
    let metadata = format.map(|format| HashMap::from([("format".to_owned(), format.to_owned())]));
    let refuse = |reason: String| TensorsError::Format { reason };
    let metadata = Metadata::new(metadata, infos).map_err(|error| refuse(error.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|error| refuse(error.to_string()))?;
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    let mut header = (json.len() as u64).to_le_bytes().to_vec();
    header.extend(json);
    Ok(header)
}

/// Bytes of a whole file with that header.
pub(crate) fn encoded_len(header: &[u8], tensors: &NamedTensors) -> usize {
    header.len() + tensors.values().map(|tensor| size_of_val(tensor.values.as_slice())).sum::<usize>()
}

/// Writes header and numbers, one buffer at a time.
pub(crate) fn write_tensors(
    writer: &mut (impl Write + ?Sized),
    header: &[u8],
    tensors: &NamedTensors,
) -> io::Result<()> {
    writer.write_all(header)?;
    let mut buffer = Vec::with_capacity(BUFFER_BYTES);
    for tensor in tensors.values() {
        for values in tensor.values.chunks(BUFFER_BYTES / size_of::<f32>()) {
            buffer.clear();
            buffer.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            writer.write_all(&buffer)?;
        }
    }
    Ok(())
}

/// Reads a whole file of `file_bytes` bytes. `choose` sees every tensor's name and shape before memory is taken
/// for it; no tensor is larger than the file.
pub(crate) fn read_tensors(
    reader: &mut impl Read,
    file_bytes: u64,
    bounds: &ReaderBounds,
    formats: Formats,
    choose: impl Fn(&str, &[usize]) -> Choice,
) -> Result<NamedTensors, TensorsError> {
    let metadata = read_header(reader, file_bytes, bounds)?;
    let infos = metadata.tensors();
    let mut tensors = NamedTensors::new();
    for name in metadata.offset_keys() {
        let Some(info) = infos.get(&name) else { unreachable!("both lists come from one header") };
        let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
        match choose(&name, &info.shape) {
            Choice::Ignore => skip(reader, bytes)?,
            Choice::Refuse(reason) => return Err(TensorsError::Tensor { name, reason }),
            Choice::Read => {
                let values = read_values(reader, &name, info, formats)?;
                tensors.insert(name, HostTensor { shape: info.shape.clone(), values });
            }
        }
    }
    Ok(tensors)
}

/// Parses the header and checks that it accounts for every byte of the file.
fn read_header(reader: &mut impl Read, file_bytes: u64, bounds: &ReaderBounds) -> Result<Metadata, TensorsError> {
    let format = |reason: String| TensorsError::Format { reason };
    if file_bytes > bounds.file_bytes_max {
        return Err(TensorsError::TooLarge { what: "file", found: file_bytes, maximum: bounds.file_bytes_max });
    }
    if file_bytes < LENGTH_BYTES as u64 {
        return Err(format(format!("{file_bytes} bytes are too few for a header length")));
    }
    let mut length = [0; LENGTH_BYTES];
    reader.read_exact(&mut length)?;
    let length = u64::from_le_bytes(length);
    if length > bounds.header_bytes_max {
        return Err(TensorsError::TooLarge { what: "header", found: length, maximum: bounds.header_bytes_max });
    }
    let remaining = file_bytes - LENGTH_BYTES as u64;
    if length > remaining {
        return Err(format(format!("the header claims {length} bytes, {remaining} are left")));
    }
    let mut json = vec![0; length as usize];
    reader.read_exact(&mut json)?;
    let metadata: Metadata = serde_json::from_slice(&json).map_err(|error| format(format!("header: {error}")))?;
    let (announced, found) = (metadata.data_len() as u64, remaining - length);
    if announced != found {
        return Err(format(format!("the header describes {announced} bytes of tensors, the file has {found}")));
    }
    Ok(metadata)
}

fn skip(reader: &mut impl Read, bytes: u64) -> Result<(), TensorsError> {
    let skipped = io::copy(&mut reader.take(bytes), &mut io::sink())?;
    if skipped < bytes { Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()) } else { Ok(()) }
}

/// One tensor's numbers as f32.
fn read_values(
    reader: &mut impl Read,
    name: &str,
    info: &TensorInfo,
    formats: Formats,
) -> Result<Vec<f32>, TensorsError> {
    let refuse = |reason: String| TensorsError::Tensor { name: name.to_owned(), reason };
    let (width, convert): (usize, Convert) = match (info.dtype, formats) {
        (Dtype::F32, _) => (4, append_f32),
        (Dtype::BF16, Formats::F32Bf16F16) => (2, append_bf16),
        (Dtype::F16, Formats::F32Bf16F16) => (2, append_f16),
        (other, Formats::OnlyF32) => return Err(refuse(format!("number format {other}, only F32 is read here"))),
        (other, Formats::F32Bf16F16) => {
            return Err(refuse(format!("number format {other}; F32, BF16 and F16 are read")));
        }
    };
    let mut bytes_left = info.data_offsets.1 - info.data_offsets.0;
    let elements = bytes_left / width;
    let mut values = Vec::new();
    values.try_reserve_exact(elements).map_err(|_| refuse(format!("no memory for {elements} elements")))?;
    let mut buffer = vec![0; BUFFER_BYTES.min(bytes_left)];
    while bytes_left > 0 {
        let part = &mut buffer[..BUFFER_BYTES.min(bytes_left)];
        reader.read_exact(part)?;
        convert(part, &mut values);
        bytes_left -= part.len();
    }
    Ok(values)
}

/// Appends a buffer's numbers as f32.
type Convert = fn(&[u8], &mut Vec<f32>);

fn append_f32(bytes: &[u8], values: &mut Vec<f32>) {
    let (words, _) = bytes.as_chunks::<4>();
    values.extend(words.iter().map(|&word| f32::from_le_bytes(word)));
}

fn append_bf16(bytes: &[u8], values: &mut Vec<f32>) {
    let (words, _) = bytes.as_chunks::<2>();
    values.extend(words.iter().map(|&word| half::bf16::from_le_bytes(word).to_f32()));
}

fn append_f16(bytes: &[u8], values: &mut Vec<f32>) {
    let (words, _) = bytes.as_chunks::<2>();
    values.extend(words.iter().map(|&word| half::f16::from_le_bytes(word).to_f32()));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> NamedTensors {
        let tensor = |shape: &[usize], first: f32| HostTensor {
            shape: shape.to_vec(),
            values: (0..shape.iter().product()).map(|index: usize| first + index as f32).collect(),
        };
        [("b", tensor(&[2, 3], 0.5)), ("a", tensor(&[], -1.0)), ("empty", tensor(&[0, 4], 0.0))]
            .map(|(name, tensor)| (name.to_owned(), tensor))
            .into()
    }

    #[test]
    fn bytes_are_those_of_the_reference_writer() {
        let tensors = tensors();
        let bytes: Vec<(String, Vec<u8>)> = tensors
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.values.iter().flat_map(|v| v.to_le_bytes()).collect()))
            .collect();
        let views = bytes.iter().map(|(name, bytes)| {
            let shape = tensors[name].shape.clone();
            (name.clone(), safetensors::tensor::TensorView::new(Dtype::F32, shape, bytes).unwrap())
        });
        assert_eq!(encode_tensors(&tensors).unwrap(), safetensors::serialize(views, None).unwrap());
    }

    #[test]
    fn every_bit_of_every_float_survives() {
        let patterns = [0x7fc0_0001u32, 0xffff_ffff, 0x8000_0000, 0x0000_0001, 0x7f80_0000, 0x3f80_0000];
        let values: Vec<f32> = patterns.iter().map(|&bits| f32::from_bits(bits)).collect();
        let tensors = NamedTensors::from([("x".to_owned(), HostTensor { shape: vec![6], values })]);
        let back = decode_tensors(&encode_tensors(&tensors).unwrap()).unwrap();
        assert_eq!(back["x"].values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), patterns);
        assert_eq!(decode_tensors(&encode_tensors(&self::tensors()).unwrap()).unwrap(), self::tensors());
    }

    #[test]
    fn tensors_longer_than_the_buffer_are_whole() {
        let elements = BUFFER_BYTES / 4 + 3;
        let values = (0..elements).map(|index| index as f32).collect();
        let tensors = NamedTensors::from([("long".to_owned(), HostTensor { shape: vec![elements], values })]);
        assert_eq!(decode_tensors(&encode_tensors(&tensors).unwrap()).unwrap(), tensors);
    }

    #[test]
    fn truncations_and_trailing_bytes_are_refused() {
        let bytes = encode_tensors(&tensors()).unwrap();
        for length in 0..bytes.len() {
            assert!(decode_tensors(&bytes[..length]).is_err(), "{length} of {} bytes", bytes.len());
        }
        let longer = [bytes.as_slice(), &[0]].concat();
        assert!(matches!(decode_tensors(&longer), Err(TensorsError::Format { .. })));
    }

    /// A file with that header and no numbers.
    fn file_of(header: &str) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes()].concat()
    }

    #[test]
    fn sizes_that_a_file_cannot_have_take_no_memory() {
        let huge_length = [&u64::MAX.to_le_bytes()[..], b"{}"].concat();
        assert!(matches!(decode_tensors(&huge_length), Err(TensorsError::TooLarge { what: "header", .. })));
        let beyond_file = [&1000u64.to_le_bytes()[..], b"{}"].concat();
        assert!(matches!(decode_tensors(&beyond_file), Err(TensorsError::Format { .. })));
        let terabyte = r#"{"x":{"dtype":"F32","shape":[274877906944],"data_offsets":[0,1099511627776]}}"#;
        assert!(matches!(decode_tensors(&file_of(terabyte)), Err(TensorsError::Format { .. })));
        let overflow = r#"{"x":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,16]}}"#;
        assert!(matches!(decode_tensors(&file_of(overflow)), Err(TensorsError::Format { .. })));
        let bounds = ReaderBounds { file_bytes_max: 4, ..ReaderBounds::default() };
        let read = read_tensors(&mut &[0u8; 8][..], 8, &bounds, Formats::OnlyF32, |_, _| Choice::Read);
        assert!(matches!(read, Err(TensorsError::TooLarge { what: "file", .. })));
    }

    #[test]
    fn half_precision_is_read_only_where_it_is_expected() {
        let header = r#"{"h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"b":{"dtype":"BF16","shape":[1],"data_offsets":[4,6]}}"#;
        let mut file = file_of(header);
        file.extend([0x3c00u16, 0xc500].iter().flat_map(|half| half.to_le_bytes()));
        file.extend(0x3f80u16.to_le_bytes());
        assert!(matches!(decode_tensors(&file), Err(TensorsError::Tensor { .. })));
        let bounds = ReaderBounds::default();
        let read = |bytes: &[u8]| {
            let mut rest = bytes;
            read_tensors(&mut rest, bytes.len() as u64, &bounds, Formats::F32Bf16F16, |_, _| Choice::Read)
        };
        let tensors = read(&file).unwrap();
        assert_eq!(tensors["h"].values, [1.0, -5.0]);
        assert_eq!(tensors["b"].values, [1.0]);
        let integers = r#"{"x":{"dtype":"I64","shape":[0],"data_offsets":[0,0]}}"#;
        assert!(matches!(read(&file_of(integers)), Err(TensorsError::Tensor { .. })));
    }

    #[test]
    fn a_shape_that_does_not_fit_its_values_is_not_written() {
        let tensors = NamedTensors::from([("x".to_owned(), HostTensor { shape: vec![3], values: vec![0.0; 2] })]);
        assert!(matches!(encode_tensors(&tensors), Err(TensorsError::Tensor { .. })));
    }
}
