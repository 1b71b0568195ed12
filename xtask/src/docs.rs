//! `cargo xtask docs`: whether what the documents show is what the commands print, and `--write`, which puts it there.
//!
//! A block is
//! ~~~text
//! ```text
//! $ beringia plan ARGUMENTS
//! what it prints
//! ```
//! ~~~
//! Its command goes through `sh`, so that it may end in `| grep ...`; standard error counts as output. A picture that a command draws is compared
//! as well, and drawn elsewhere where nothing is to be written. `cargo xtask published` stands for the table of [`crate::published`].

use crate::published;
use crate::runs::Failure;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Documents that are looked at where none are named.
const DOCUMENTS: [&str; 2] = ["docs/mission.md", "docs/published.md"];

/// Beginnings of the commands that are run.
const COMMANDS: [&str; 3] = ["beringia plan ", "beringia predict ", published::PREDICTED];

/// The one command that is answered here.
const PUBLISHED: &str = "cargo xtask published";

/// The option behind which a command names its picture.
const PICTURE: &str = " --picture ";

/// Settings of the command.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Documents; docs/mission.md and docs/published.md unless given
    documents: Vec<PathBuf>,
    /// Replace what is otherwise instead of saying so
    #[arg(long)]
    write: bool,
    /// The program; the one beside this unless given
    #[arg(long, value_name = "PATH")]
    beringia: Option<PathBuf>,
}

/// One command of a document.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    /// Without the dollar.
    command: String,
    /// Line of the command, counted from 1.
    line: usize,
    /// Bytes of what it printed.
    output: Range<usize>,
}

/// Runs the command.
pub(crate) fn run(options: &Options) -> Result<(), Failure> {
    let program = program(options.beringia.as_deref())?;
    let documents: Vec<PathBuf> =
        if options.documents.is_empty() { DOCUMENTS.map(PathBuf::from).to_vec() } else { options.documents.clone() };
    let mut different = Vec::new();
    for document in &documents {
        let text = fs::read_to_string(document).map_err(|error| format!("{}: {error}", document.display()))?;
        let mut new = text.clone();
        let blocks = blocks(&text);
        // From the end, so that what is replaced does not move what is still to be.
        for block in blocks.iter().rev() {
            let printed = printed(&program, &block.command, options.write)?;
            let shown = &text[block.output.clone()];
            if shown != printed {
                different.push(difference(document, block, shown, &printed));
                new.replace_range(block.output.clone(), &printed);
            }
        }
        if options.write && new != text {
            fs::write(document, new)?;
        }
        println!("{}: {} commands", document.display(), blocks.len());
    }
    match (different.is_empty(), options.write) {
        (true, _) => Ok(()),
        (false, true) => {
            println!("{} replaced", different.len());
            Ok(())
        }
        (false, false) => Err(format!("{}\n`cargo xtask docs --write` replaces them", different.join("\n")).into()),
    }
}

/// The program to ask, as an absolute path.
pub(crate) fn program(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe()?.with_file_name("beringia");
    let program = given.unwrap_or(&beside);
    let found = program.canonicalize();
    Ok(found.map_err(|error| {
        format!("{}: {error}; build it with `cargo build`, or name it with --beringia", program.display())
    })?)
}

fn blocks(text: &str) -> Vec<Block> {
    let mut found: Vec<Block> = Vec::new();
    let (mut place, mut before, mut open) = (0, "", false);
    for (index, line) in text.split_inclusive('\n').enumerate() {
        let end = place + line.len();
        let command = line.trim_end().strip_prefix("$ ").filter(|_| before.trim_end() == "```text");
        let is_known =
            |command: &&str| COMMANDS.iter().any(|known| command.starts_with(known)) || *command == PUBLISHED;
        match (command.filter(is_known), found.last_mut()) {
            (Some(command), _) => {
                found.push(Block { command: command.to_owned(), line: index + 1, output: end..end });
                open = true;
            }
            (None, _) if line.trim_end() == "```" => open = false,
            (None, Some(block)) if open => block.output.end = end,
            _ => {}
        }
        (place, before) = (end, line);
    }
    found
}

/// What a command prints, and what is otherwise with its picture.
fn printed(program: &Path, command: &str, write: bool) -> Result<String, Failure> {
    if command == PUBLISHED {
        return published::table(program);
    }
    let Some((before, rest)) = command.split_once(PICTURE).filter(|_| !write) else { return shell(program, command) };
    let (picture, after) = rest.split_once(' ').unwrap_or((rest, ""));
    let elsewhere = std::env::temp_dir().join(format!("beringia-docs-{}.svg", std::process::id()));
    let printed = shell(program, &format!("{before}{PICTURE}{} {after}", elsewhere.display()))?;
    let (drawn, shown) = (fs::read(&elsewhere), fs::read(picture));
    let _ = fs::remove_file(&elsewhere);
    if drawn? == shown? { Ok(printed) } else { Ok(format!("{printed}{picture} is another picture\n")) }
}

fn shell(program: &Path, command: &str) -> Result<String, Failure> {
    let folder = program.parent().unwrap_or(Path::new("."));
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let paths = std::env::join_paths([folder.to_path_buf()].into_iter().chain(std::env::split_paths(&paths)))?;
    let all = format!("{{ {command}; }} 2>&1");
    let output = Command::new("sh").arg("-c").arg(all).env("PATH", paths).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

/// Where a block says something else, with the first line that differs.
fn difference(document: &Path, block: &Block, shown: &str, printed: &str) -> String {
    let lines = shown.lines().zip(printed.lines()).find(|(shown, printed)| shown != printed);
    let detail = lines.map_or_else(
        || format!("    {} lines instead of {}", printed.lines().count(), shown.lines().count()),
        |(shown, printed)| format!("    shown:   {shown}\n    printed: {printed}"),
    );
    format!("{}:{}: `{}` prints something else\n{detail}", document.display(), block.line, block.command)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "a\n```text\n$ beringia plan --x | grep y\none\ntwo\n```\n```text\n$ rm -r /\n```\n```sh\n$ beringia plan no\n```\n```text\n$ beringia predict z\n```\nend\n";

    #[test]
    fn only_blocks_of_known_commands_are_run_and_their_output_is_found() {
        let found = blocks(TEXT);
        let commands: Vec<&str> = found.iter().map(|block| block.command.as_str()).collect();
        assert_eq!(commands, ["beringia plan --x | grep y", "beringia predict z"]);
        assert_eq!((found[0].line, &TEXT[found[0].output.clone()]), (3, "one\ntwo\n"));
        assert_eq!(&TEXT[found[1].output.clone()], "");
    }

    #[test]
    fn a_difference_names_the_place_and_the_first_line() {
        let block = &blocks(TEXT)[0];
        let told = difference(Path::new("docs/x.md"), block, "one\ntwo\n", "one\nthree\n");
        assert!(told.starts_with("docs/x.md:3: `beringia plan --x | grep y`"), "{told}");
        assert!(told.ends_with("shown:   two\n    printed: three"), "{told}");
        assert!(difference(Path::new("x"), block, "one\n", "one\ntwo\n").ends_with("2 lines instead of 1"));
    }
}
