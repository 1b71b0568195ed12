//! The text column of a parquet file, row by row.
//!
//! Only the one column is read, a page at a time, so that memory depends on the writer's page size (commonly
//! 1 MiB; the format allows 2 GiB) and not on the file. This is not a general parquet reader: nested and list
//! columns are refused.
//!
//! The `parquet` crate meets damaged pages with assertions in places and sizes a dictionary by what its header
//! claims. Both are contained here, for a downloaded file that is broken must not end a run: pages are checked
//! on their way in, and a panic inside the crate ends the file, not the process.

use crate::corpus::CorpusFile;
use crate::documents::CorpusReport;
use parquet::basic::Type as PhysicalType;
use parquet::column::page::{Page, PageMetadata, PageReader};
use parquet::column::reader::ColumnReaderImpl;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::errors::{ParquetError, Result as ParquetResult};
use parquet::file::reader::{FileReader, SerializedFileReader};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// Rows decoded at once. Values point into their pages, so this bounds the pages held, not copies.
const ROWS_DECODED_MAX: usize = 64;

/// Largest uncompressed text column of a row group, bytes. The format's pages are below 2^31; a column that
/// claims more than 16 of them is taken for a damaged file.
const COLUMN_BYTES_MAX: i64 = 16 << 31;

/// An open parquet file.
pub(crate) struct ParquetText {
    file: SerializedFileReader<File>,
    column: usize,
    /// Definition level of a value that is not null.
    level_present: i16,
    row_group: usize,
    pages: Option<ColumnReaderImpl<ByteArrayType>>,
    /// Decoded values not yet given out, in reverse; `None` for null.
    rows: Vec<Option<ByteArray>>,
    row: u64,
}

impl ParquetText {
    /// Reads the footer and finds the column `text`, or else `content`.
    pub(crate) fn open(path: &Path) -> Result<Self, String> {
        contained(|| Self::open_file(path))
    }

    fn open_file(path: &Path) -> Result<Self, String> {
        let file = File::open(path).map_err(|error| error.to_string())?;
        let file = SerializedFileReader::new(file).map_err(|error| format!("not a whole parquet file: {error}"))?;
        let schema = file.metadata().file_metadata().schema_descr();
        let position = |name: &str| schema.columns().iter().position(|column| column.path().parts() == [name]);
        let column = position("text").or_else(|| position("content"));
        let column = column.ok_or("has neither a column `text` nor `content`")?;
        let description = schema.column(column);
        if description.physical_type() != PhysicalType::BYTE_ARRAY || description.max_rep_level() > 0 {
            return Err(format!("column `{}` does not hold strings", description.name()));
        }
        let level_present = description.max_def_level();
        Ok(Self { file, column, level_present, row_group: 0, pages: None, rows: Vec::new(), row: 0 })
    }

    /// The next text. A null or a value that is not UTF-8 is skipped (the latter with a warning); damage ends
    /// the file with a warning.
    pub(crate) fn next(&mut self, file: &CorpusFile, report: &mut CorpusReport) -> Option<String> {
        loop {
            while let Some(value) = self.rows.pop() {
                self.row += 1;
                let Some(value) = value else { continue };
                match std::str::from_utf8(value.data()) {
                    Ok(text) => return Some(text.to_owned()),
                    Err(error) => report.warn(&file.name, Some(self.row), format!("row is not UTF-8: {error}")),
                }
            }
            match contained(|| self.decode_rows()) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(error) => {
                    report.warn(&file.name, Some(self.row + 1), format!("the rows from here cannot be read: {error}"));
                    self.row_group = self.file.num_row_groups();
                    self.pages = None;
                    return None;
                }
            }
        }
    }

    /// Fills `rows`; false at the end of the file.
    fn decode_rows(&mut self) -> Result<bool, String> {
        loop {
            if self.pages.is_none() {
                if self.row_group == self.file.num_row_groups() {
                    return Ok(false);
                }
                self.pages = Some(self.open_row_group()?);
                self.row_group += 1;
            }
            let Some(pages) = &mut self.pages else { continue };
            let (mut levels, mut values) = (Vec::new(), Vec::new());
            let (records, _, _) = pages
                .read_records(ROWS_DECODED_MAX, Some(&mut levels), None, &mut values)
                .map_err(|error| error.to_string())?;
            if records == 0 {
                self.pages = None;
                continue;
            }
            self.rows = with_nulls(records, &levels, self.level_present, values)?;
            return Ok(true);
        }
    }

    fn open_row_group(&self) -> Result<ColumnReaderImpl<ByteArrayType>, String> {
        let group = self.file.get_row_group(self.row_group).map_err(|error| error.to_string())?;
        let bytes = group.metadata().column(self.column).uncompressed_size();
        if !(0..=COLUMN_BYTES_MAX).contains(&bytes) {
            return Err(format!("row group {} claims {bytes} bytes of text", self.row_group));
        }
        let pages = group.get_column_page_reader(self.column).map_err(|error| error.to_string())?;
        let description = self.file.metadata().file_metadata().schema_descr().column(self.column);
        Ok(ColumnReaderImpl::new(description, Box::new(CheckedPages { pages })))
    }
}

/// Turns a panic inside the `parquet` crate into an error. What it was working on is dropped by the caller.
fn contained<T>(read: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err("it is damaged".to_owned()))
}

/// Pages whose dictionaries are no larger than their bytes allow.
struct CheckedPages {
    pages: Box<dyn PageReader>,
}

impl PageReader for CheckedPages {
    fn get_next_page(&mut self) -> ParquetResult<Option<Page>> {
        let page = self.pages.get_next_page()?;
        if let Some(Page::DictionaryPage { buf, num_values, .. }) = &page {
            // Each string of a dictionary begins with its length, four bytes.
            if *num_values as usize > buf.len() / 4 {
                let reason = format!("a dictionary of {} bytes claims {num_values} strings", buf.len());
                return Err(ParquetError::General(reason));
            }
        }
        Ok(page)
    }

    fn peek_next_page(&mut self) -> ParquetResult<Option<PageMetadata>> {
        self.pages.peek_next_page()
    }

    fn skip_next_page(&mut self) -> ParquetResult<()> {
        self.pages.skip_next_page()
    }
}

impl Iterator for CheckedPages {
    type Item = ParquetResult<Page>;

    fn next(&mut self) -> Option<Self::Item> {
        self.get_next_page().transpose()
    }
}

/// Puts the nulls back between the values, last row first.
fn with_nulls(
    records: usize,
    levels: &[i16],
    level_present: i16,
    values: Vec<ByteArray>,
) -> Result<Vec<Option<ByteArray>>, String> {
    let mut values = values.into_iter();
    // A required column has no levels: every row has a value.
    let present = |row: usize| level_present == 0 || levels.get(row) == Some(&level_present);
    let mut rows = Vec::with_capacity(records);
    for row in 0..records {
        rows.push(if present(row) { Some(values.next().ok_or("fewer values than rows")?) } else { None });
    }
    rows.reverse();
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use crate::corpus::Corpus;
    use crate::documents::CorpusReport;
    use parquet::basic::{Compression, GzipLevel, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType, Int32Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::SerializedFileWriter;
    use parquet::schema::parser::parse_message_type;
    use std::fs;
    use std::sync::Arc;

    /// A file of `groups` row groups with an id and an optional text column; every third text is null.
    fn parquet_file(column: &str, groups: usize, rows: usize, compression: Compression) -> Vec<u8> {
        let schema = format!("message m {{ REQUIRED INT32 id; OPTIONAL BYTE_ARRAY {column} (UTF8); }}");
        let schema = Arc::new(parse_message_type(&schema).unwrap());
        let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
        let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
        for group in 0..groups {
            let mut row_group = writer.next_row_group().unwrap();
            let mut ids = row_group.next_column().unwrap().unwrap();
            let numbers: Vec<i32> = (0..rows as i32).collect();
            ids.typed::<Int32Type>().write_batch(&numbers, None, None).unwrap();
            ids.close().unwrap();
            let mut texts = row_group.next_column().unwrap().unwrap();
            let levels: Vec<i16> = (0..rows).map(|row| i16::from(row % 3 != 0)).collect();
            let values: Vec<ByteArray> = (0..rows)
                .filter(|row| row % 3 != 0)
                .map(|row| ByteArray::from(format!("group {group} row {row} {}", "text ".repeat(row % 40)).as_str()))
                .collect();
            texts.typed::<ByteArrayType>().write_batch(&values, Some(&levels), None).unwrap();
            texts.close().unwrap();
            row_group.close().unwrap();
        }
        writer.into_inner().unwrap()
    }

    fn read(bytes: &[u8]) -> (Vec<String>, CorpusReport) {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("a.parquet"), bytes).unwrap();
        let corpus = Corpus::folder(folder.path()).unwrap();
        let mut documents = corpus.documents();
        let texts = documents.by_ref().collect();
        (texts, documents.into_report())
    }

    #[test]
    fn rows_of_every_group_and_compression() {
        let codecs = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::LZ4_RAW,
            Compression::GZIP(GzipLevel::default()),
            Compression::ZSTD(ZstdLevel::default()),
        ];
        for compression in codecs {
            let (texts, report) = read(&parquet_file("text", 3, 200, compression));
            // Of 200 rows, numbers 0, 3, ... 198 (67 of them) are null.
            assert_eq!(texts.len(), 3 * (200 - 67), "{compression:?}");
            assert!(texts[0].starts_with("group 0 row 1 ") && texts[398].starts_with("group 2 row 199 "));
            assert_eq!(report.warnings, 0);
        }
        assert_eq!(read(&parquet_file("content", 1, 4, Compression::UNCOMPRESSED)).0.len(), 2);
    }

    #[test]
    fn a_file_without_text_says_so() {
        let (texts, report) = read(&parquet_file("body", 1, 10, Compression::UNCOMPRESSED));
        assert!(texts.is_empty());
        assert!(report.warnings_kept[0].to_string().contains("neither a column `text`"), "{report:?}");
    }

    #[test]
    fn a_truncated_file_is_a_warning() {
        let whole = parquet_file("text", 2, 100, Compression::SNAPPY);
        for length in [0, 3, 11, whole.len() / 2, whole.len() - 1] {
            let (texts, report) = read(&whole[..length]);
            assert!(texts.is_empty());
            assert!(report.warnings_kept[0].to_string().contains("not a whole parquet file"), "{report:?}");
        }
    }

    #[test]
    fn damage_anywhere_neither_panics_nor_hangs() {
        let whole = parquet_file("text", 2, 30, Compression::SNAPPY);
        for at in 0..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1 << (at % 8);
            let (texts, _) = read(&damaged);
            assert!(texts.len() <= 1_000, "byte {at}: {} texts", texts.len());
        }
    }
}
