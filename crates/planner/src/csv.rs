//! Comma-separated tables with a header (RFC 4180): bounded, and every complaint names row and column.

use base::Hint;

/// Longest table, bytes.
const TEXT_BYTES_MAX: usize = 64 << 20;
/// Most rows.
const ROWS_MAX: usize = 1_000_000;
/// Most columns.
const COLUMNS_MAX: usize = 256;
/// Longest cell, bytes.
const CELL_BYTES_MAX: usize = 64 << 10;

/// Characters of a column's name that a complaint repeats.
const COLUMN_CHARACTERS_SHOWN: usize = 80;

/// Why a text is no table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CsvError {
    /// More than is read.
    #[error("the table is too large: {found} {what}, at most {maximum} are read")]
    TooLarge {
        /// What there is too much of.
        what: &'static str,
        /// How much there is.
        found: usize,
        /// How much there may be.
        maximum: usize,
    },
    /// No header.
    #[error("the table is empty: its first line must name the columns")]
    Empty,
    /// A row of another length than the header.
    #[error("row {row} has {found} cells, the header {expected}")]
    Ragged {
        /// Row, counted from 1 after the header.
        row: usize,
        /// Its cells.
        found: usize,
        /// The header's.
        expected: usize,
    },
    /// A quote that is not closed.
    #[error("row {row}: a quoted cell does not end")]
    OpenQuote {
        /// Row, counted from 1 after the header, which is 0.
        row: usize,
    },
    /// Text between a closing quote and the next comma.
    #[error("row {row}: text follows the closing quote of a cell")]
    AfterQuote {
        /// Row, counted from 1 after the header, which is 0.
        row: usize,
    },
    /// Columns divided by something else.
    #[error("the header is one cell that holds a {separator}: columns are divided by commas")]
    Separator {
        /// What divides them.
        separator: &'static str,
    },
    /// Two columns of one name.
    #[error("the header names the column \"{column}\" twice")]
    DoubleColumn {
        /// Its name.
        column: String,
    },
    /// A column that a reader needs.
    #[error("the table has no column \"{column}\"")]
    NoColumn {
        /// Its name.
        column: String,
    },
}

impl Hint for CsvError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::TooLarge { .. } => "split the table".to_owned(),
            Self::Empty => "begin with the line of columns that docs/planner.md gives".to_owned(),
            Self::Ragged { row, .. } => format!("count the commas of row {row}; a cell with a comma needs quotes"),
            Self::OpenQuote { row } => format!("close the quote of row {row} with \""),
            Self::AfterQuote { row } => format!("write a quote inside a quoted cell of row {row} twice: \"\""),
            Self::Separator { .. } => "save the table with commas between its columns".to_owned(),
            Self::DoubleColumn { column } => format!("remove one of the columns \"{column}\""),
            Self::NoColumn { column } => format!("add \"{column}\" to the first line"),
        })
    }
}

/// A header and rows of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Reads a table.
    pub fn parse(text: &str) -> Result<Self, CsvError> {
        bounded("bytes", text.len(), TEXT_BYTES_MAX)?;
        let mut records = Records { rest: text.strip_prefix('\u{feff}').unwrap_or(text), row: 0 };
        let header = records.next_record()?.ok_or(CsvError::Empty)?;
        bounded("columns", header.len(), COLUMNS_MAX)?;
        let header: Vec<String> = header.iter().map(|name| name.trim().to_owned()).collect();
        if let [one] = &header[..] {
            let separators = [(';', "semicolon"), ('\t', "tab")];
            if let Some((_, separator)) = separators.into_iter().find(|(separator, _)| one.contains(*separator)) {
                return Err(CsvError::Separator { separator });
            }
        }
        if let Some(column) = header.iter().enumerate().find(|(index, name)| header[..*index].contains(name)) {
            return Err(CsvError::DoubleColumn { column: column.1.chars().take(COLUMN_CHARACTERS_SHOWN).collect() });
        }
        let mut rows = Vec::new();
        while let Some(cells) = records.next_record()? {
            bounded("rows", rows.len() + 1, ROWS_MAX)?;
            if cells.len() != header.len() {
                return Err(CsvError::Ragged { row: rows.len() + 1, found: cells.len(), expected: header.len() });
            }
            rows.push(cells);
        }
        Ok(Self { header, rows })
    }

    /// Names of the columns.
    pub fn header(&self) -> &[String] {
        &self.header
    }

    /// Number of rows after the header.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The cells of a row under a column, trimmed; `None` where there is no such column or row.
    pub fn cell(&self, row: usize, column: &str) -> Option<&str> {
        let index = self.header.iter().position(|name| name == column)?;
        Some(self.rows.get(row)?.get(index)?.trim())
    }

    /// Refuses a table without this column.
    pub fn require(&self, column: &str) -> Result<(), CsvError> {
        if self.header.iter().any(|name| name == column) {
            return Ok(());
        }
        Err(CsvError::NoColumn { column: column.to_owned() })
    }
}

/// One cell as RFC 4180 writes it.
pub fn quoted(cell: &str) -> String {
    if cell.contains([',', '"', '\n', '\r']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.to_owned() }
}

fn bounded(what: &'static str, found: usize, maximum: usize) -> Result<(), CsvError> {
    if found > maximum { Err(CsvError::TooLarge { what, found, maximum }) } else { Ok(()) }
}

struct Records<'a> {
    rest: &'a str,
    row: usize,
}

impl Records<'_> {
    /// The next line that is not blank; a quoted cell may span lines.
    fn next_record(&mut self) -> Result<Option<Vec<String>>, CsvError> {
        self.rest = self.rest.trim_start_matches(['\r', '\n']);
        if self.rest.is_empty() {
            return Ok(None);
        }
        let mut cells = Vec::new();
        loop {
            let (cell, ended) = self.next_cell()?;
            bounded("bytes in a cell", cell.len(), CELL_BYTES_MAX)?;
            bounded("columns", cells.len() + 1, COLUMNS_MAX)?;
            cells.push(cell);
            if ended {
                self.row += 1;
                return Ok(Some(cells));
            }
        }
    }

    /// A cell, and whether it is its line's last.
    fn next_cell(&mut self) -> Result<(String, bool), CsvError> {
        let mut cell = String::new();
        if let Some(inside) = self.rest.strip_prefix('"') {
            let mut inside = inside;
            loop {
                let end = inside.find('"').ok_or(CsvError::OpenQuote { row: self.row })?;
                cell.push_str(&inside[..end]);
                inside = &inside[end + 1..];
                match inside.strip_prefix('"') {
                    Some(after) => {
                        cell.push('"');
                        inside = after;
                    }
                    None => break,
                }
            }
            self.rest = inside;
            if !inside.trim_start_matches(' ').starts_with([',', '\r', '\n']) && !inside.trim().is_empty() {
                return Err(CsvError::AfterQuote { row: self.row });
            }
        }
        // A carriage return ends a line as well, with or without a line feed after it.
        let end = self.rest.find([',', '\r', '\n']).unwrap_or(self.rest.len());
        cell.push_str(&self.rest[..end]);
        let ended = !self.rest[end..].starts_with(',');
        self.rest = self.rest.get(end + 1..).unwrap_or("");
        Ok((cell, ended))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_commas_and_line_ends() {
        let table = Table::parse("a,b\r\n\"x, \"\"y\"\"\nz\",2\r\n\n3,\n").unwrap();
        assert_eq!(table.len(), 2);
        assert_eq!(table.cell(0, "a"), Some("x, \"y\"\nz"));
        assert_eq!(table.cell(1, "b"), Some(""));
        assert_eq!(table.cell(1, "c"), None);
        assert_eq!(quoted("x, \"y\""), "\"x, \"\"y\"\"\"");
        let old = Table::parse("a,b\r1,2\r\r3,4").unwrap();
        assert_eq!((old.len(), old.cell(1, "b")), (2, Some("4")));
    }

    #[test]
    fn what_is_wrong_says_where() {
        let message = |text: &str| Table::parse(text).unwrap_err().to_string();
        assert_eq!(message(""), "the table is empty: its first line must name the columns");
        assert_eq!(message("a,b\n1,2\n3\n"), "row 2 has 1 cells, the header 2");
        assert_eq!(message("a\n\"x"), "row 1: a quoted cell does not end");
        assert_eq!(message("a\n\"x\"y\n"), "row 1: text follows the closing quote of a cell");
        assert_eq!(
            message("a;b\n1;2\n"),
            "the header is one cell that holds a semicolon: columns are divided by commas"
        );
        assert_eq!(message("a,a\n"), "the header names the column \"a\" twice");
        assert!(message(&"a,".repeat(300)).contains("too large"));
        assert_eq!(Table::parse("a\n").unwrap().require("b").unwrap_err().to_string(), "the table has no column \"b\"");
    }
}
