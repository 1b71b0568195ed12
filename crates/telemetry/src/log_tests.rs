//! Tests of `log`: numbering, torn lines, full disks, hostile content, following.

use super::*;
use crate::event::event_tests::one_of_each;
use std::cell::RefCell;
use std::fs;

/// A clock that counts.
fn clock() -> Clock {
    let ticks = std::sync::atomic::AtomicU64::new(0);
    Box::new(move || ticks.fetch_add(1, std::sync::atomic::Ordering::Relaxed))
}

fn warning(message: &str) -> Event {
    Event::Warning { message: message.to_owned(), hint: None }
}

fn log_at(path: &Path) -> EventLog {
    EventLog::open(path, "site-a", clock()).unwrap()
}

fn append(log: &mut EventLog, event: Event) -> Record {
    let record = log.stamp(event);
    log.append(&record).unwrap();
    record
}

fn read_all(path: &Path) -> (Vec<Record>, SkippedLines) {
    let mut records = read(path).unwrap();
    let all = records.by_ref().collect::<Result<Vec<_>, _>>().unwrap();
    (all, records.skipped())
}

#[test]
fn what_is_appended_is_read_and_numbering_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let mut written = Vec::new();
    for _ in 0..2 {
        let mut log = log_at(&path);
        assert_eq!(log.torn_bytes_found(), 0);
        written.extend(one_of_each().into_iter().map(|event| append(&mut log, event)));
    }
    let numbers: Vec<u64> = written.iter().map(|record| record.seq).collect();
    assert_eq!(numbers, (0..written.len() as u64).collect::<Vec<_>>());
    assert_eq!(written[1].unix_ms, 1, "the time comes from the given clock");
    assert_eq!(read_all(&path), (written, SkippedLines::default()));
}

/// Cut at every byte of the last line: what was whole before it stays, and what comes after it is not lost.
#[test]
fn a_torn_last_line_costs_only_itself() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let mut log = log_at(&path);
    let first = append(&mut log, warning("first"));
    let whole = fs::metadata(&path).unwrap().len();
    append(&mut log, warning("torn"));
    let content = fs::read(&path).unwrap();
    for cut in whole as usize..content.len() {
        fs::write(&path, &content[..cut]).unwrap();
        let torn = cut as u64 - whole;
        let mut reader = read(&path).unwrap();
        assert_eq!(reader.by_ref().count(), 1);
        assert_eq!(reader.unfinished_bytes(), torn);
        let mut log = log_at(&path);
        assert_eq!(log.torn_bytes_found(), torn);
        // Whole but for its line end, the last record is not lost either: the line end comes with the next one.
        let complete = cut + 1 == content.len();
        let next = append(&mut log, warning("next"));
        let (records, skipped) = read_all(&path);
        assert_eq!(records.len(), if complete { 3 } else { 2 }, "cut at {cut}");
        assert_eq!((&records[0], records.last().unwrap()), (&first, &next));
        assert_eq!(skipped.malformed, u64::from(torn > 0 && !complete), "cut at {cut}");
        assert_eq!(next.seq, records.len() as u64 - 1, "no number is given twice");
    }
}

#[test]
fn unknown_and_damaged_lines_are_counted_and_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let record = append(&mut log_at(&path), warning("known"));
    let mut content = fs::read(&path).unwrap();
    content.extend(b"{\"v\":7,\"seq\":9,\"unix_ms\":0,\"source\":\"s\",\"event\":\"teleported\"}\n");
    content.extend([0xff, 0x00, b'{', b'\n']);
    content.extend(vec![b'x'; LINE_BYTES_MAX + 1]);
    content.extend(b"\n\n");
    fs::write(&path, content).unwrap();
    assert_eq!(read_all(&path), (vec![record], SkippedLines { unknown: 1, malformed: 2 }));
    // The number of a record of the future is not given again.
    assert_eq!(append(&mut log_at(&path), warning("later")).seq, 10);
}

/// Memory stays bounded whatever a line's length: only a line's first part is ever kept.
#[test]
fn an_endless_line_is_not_kept() {
    let mut lines = Lines::default();
    for _ in 0..64 {
        lines.push(&vec![b'x'; 1 << 20], |_| panic!("the line has no end"));
        assert!(lines.partial.len() <= LINE_BYTES_MAX);
    }
    let seen = RefCell::new(0);
    lines.push(b"\n", |line| {
        assert!(line.is_none());
        *seen.borrow_mut() += 1;
    });
    assert_eq!(seen.into_inner(), 1);
}

#[test]
fn numbers_are_found_behind_a_tail_without_records() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    for _ in 0..3 {
        append(&mut log_at(&path), warning("early"));
    }
    let mut content = fs::read(&path).unwrap();
    content.resize(content.len() + TAIL_BYTES as usize + 10, b'\n');
    fs::write(&path, content).unwrap();
    assert_eq!(append(&mut log_at(&path), warning("late")).seq, 3);
}

/// A device that is full, for real: Linux's `/dev/full` accepts an open and refuses each write.
#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_drops_and_counts() {
    let mut log = EventLog::open(Path::new("/dev/full"), "site-a", clock()).unwrap();
    for dropped in 1..=3 {
        let record = log.stamp(warning("lost"));
        assert_eq!(record.seq, dropped - 1, "views still get the record");
        let error = log.append(&record).unwrap_err();
        assert!(error.to_string().contains("not logged"), "{error}");
        assert!(error.hint().unwrap().contains("df -h"), "{error:?}");
        assert_eq!(log.dropped(), dropped);
    }
}

/// A disk that fills up inside a line, and has room again later.
#[test]
fn after_a_short_write_the_next_record_begins_a_line() {
    struct Short(Vec<u8>, usize);
    impl Write for Short {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            let fits = self.1.min(buffer.len());
            self.1 -= fits;
            self.0.extend(&buffer[..fits]);
            if fits == 0 { Err(ErrorKind::StorageFull.into()) } else { Ok(fits) }
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut disk = Short(Vec::new(), 5);
    assert!(append_line(&mut disk, "0123456789\n", false).is_err());
    disk.1 = 100;
    append_line(&mut disk, "next\n", true).unwrap();
    assert_eq!(disk.0, b"01234\nnext\n");
}

#[test]
fn a_record_longer_than_a_reader_accepts_is_not_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("events.jsonl");
    let mut log = log_at(&path);
    let record = log.stamp(warning(&"x".repeat(LINE_BYTES_MAX)));
    assert!(matches!(log.append(&record), Err(LogError::Append { dropped: 1, .. })));
    let kept = append(&mut log, warning("kept"));
    assert_eq!(read_all(&path).0, [kept]);
}

#[test]
fn a_follower_sees_each_record_once_however_lines_arrive() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, growing) = (folder.path().join("whole"), folder.path().join("growing"));
    let mut log = log_at(&whole);
    let written: Vec<Record> = one_of_each().into_iter().map(|event| append(&mut log, event)).collect();
    let content = fs::read(&whole).unwrap();
    let mut follower = Follower::new(&growing);
    assert_eq!(follower.poll().unwrap(), [], "the file is not there yet");
    let mut seen = Vec::new();
    let mut file = File::create(&growing).unwrap();
    for part in content.chunks(37) {
        file.write_all(part).unwrap();
        seen.extend(follower.poll().unwrap());
        assert_eq!(follower.poll().unwrap(), []);
    }
    assert_eq!(seen, written);
    fs::write(&growing, b"").unwrap();
    assert!(matches!(follower.poll(), Err(LogError::Replaced { .. })));
}

#[test]
fn missing_logs_are_errors_that_end_the_iteration() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(read(&folder.path().join("none")), Err(LogError::Open { .. })));
    assert!(matches!(EventLog::open(folder.path(), "s", clock()), Err(LogError::Open { .. })));
    let path = folder.path().join("events.jsonl");
    append(&mut log_at(&path), warning("once"));
    let mut records = read(&path).unwrap();
    assert!(records.next().unwrap().is_ok());
    fs::write(&path, b"").unwrap();
    assert!(records.next().unwrap().is_err());
    assert!(records.next().is_none());
}
