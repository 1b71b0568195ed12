//! Who may come in, as `beringia admit`, `revoke` and `members` tell it a coordinator at work: through files that only their owner may
//! read, in the run's folder. Nothing listens for such commands.
//!
//! ```text
//! access/door.json             where the coordinator can be reached, and its key: what an invite is made of
//! access/members.json          who was admitted, and who is here; written again when that changes
//! access/invites/DIGEST.json   an invite for one machine, under the digest of its secret: when it ends
//! access/revoked/FINGERPRINT   a machine that may not come back
//! ```
//!
//! The files only ask: what was done with an invite, and who was revoked, is in the coordinator's log.

use base::{ContentHash, Hint, SiteId};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use wire::{Invite, InviteError, Secret};

/// The folder, in that of the run.
const ACCESS_FOLDER: &str = "access";
const DOOR_FILE: &str = "door.json";
const MEMBERS_FILE: &str = "members.json";
const INVITES_FOLDER: &str = "invites";
const REVOKED_FOLDER: &str = "revoked";

/// Files that are read of one folder: as many machines as a run admits have room.
const FILES_MAX: usize = 16_384;

/// Longest file read: 10,000 members of 300 bytes.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// Where a coordinator can be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Door {
    /// Host and port, as sites dial it.
    pub address: String,
    /// Name of the run.
    pub run: String,
    /// BLAKE3 of its certificate.
    pub fingerprint: ContentHash,
}

/// A machine that a run has admitted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// Its id.
    pub site: SiteId,
    /// The name that it gave first.
    pub name: String,
    /// BLAKE3 of its certificate.
    pub fingerprint: ContentHash,
    /// Whether it has a connection.
    pub connected: bool,
    /// Whether it may not come back.
    pub revoked: bool,
}

/// What the files ask for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Access {
    /// Digests of the secrets of invites for one machine each, with the Unix time at which each ends, seconds.
    pub invites: BTreeMap<ContentHash, u64>,
    /// Machines that may not come back.
    pub revoked: BTreeSet<ContentHash>,
}

/// The file of an invite.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct InviteFile {
    ends_unix_seconds: u64,
}

/// Why access could not be read or changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AccessError {
    /// A file.
    #[error("{path}: {source}", path = path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what was written there.
    #[error("{path}: {reason}", path = path.display())]
    Damaged {
        /// Which one.
        path: PathBuf,
        /// What the parser met.
        reason: String,
    },
    /// No coordinator has ever listened for this run.
    #[error("{path}: no coordinator of this run has listened yet", path = path.display())]
    NeverServed {
        /// The run's folder.
        path: PathBuf,
    },
    /// No secret could be made.
    #[error(transparent)]
    Random(#[from] wire::invite::RandomError),
    /// The coordinator's address makes no invite.
    #[error(transparent)]
    Invite(#[from] InviteError),
}

impl Hint for AccessError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::File { path, .. } => Some(format!("see who may read and write it: `ls -l {}`", path.display())),
            Self::Damaged { path, .. } => Some(format!("remove it: `rm {}`", path.display())),
            Self::NeverServed { path } => Some(format!("start it first: `beringia serve {}`", path.display())),
            Self::Random(_) => Some("see that /dev/urandom can be read".to_owned()),
            Self::Invite(error) => error.hint(),
        }
    }
}

/// The folder with these files.
#[derive(Debug, Clone)]
pub struct AccessFolder {
    run: PathBuf,
    root: PathBuf,
}

impl AccessFolder {
    /// Of the run in that folder.
    pub fn of(run: &Path) -> Self {
        Self { run: run.to_owned(), root: run.join(ACCESS_FOLDER) }
    }

    /// Makes it, and says where the coordinator is.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn open(&self, door: &Door) -> Result<(), AccessError> {
        for folder in [self.root.clone(), self.root.join(INVITES_FOLDER), self.root.join(REVOKED_FOLDER)] {
            let failed = |source| AccessError::File { path: folder.clone(), source };
            fs::create_dir_all(&folder).map_err(failed)?;
            fs::set_permissions(&folder, Permissions::from_mode(0o700)).map_err(failed)?;
        }
        self.write(DOOR_FILE, door)
    }

    /// Where the coordinator is, or was last.
    ///
    /// # Errors
    /// There was none, or the file cannot be read.
    pub fn door(&self) -> Result<Door, AccessError> {
        self.known(DOOR_FILE)
    }

    /// Who was admitted, as the coordinator knew it last.
    ///
    /// # Errors
    /// There was none, or the file cannot be read.
    pub fn members(&self) -> Result<Vec<Member>, AccessError> {
        self.known(MEMBERS_FILE)
    }

    /// Says who was admitted.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_members(&self, members: &[Member]) -> Result<(), AccessError> {
        self.write(MEMBERS_FILE, &members)
    }

    /// Makes an invite for one machine, which ends at that Unix time.
    ///
    /// # Errors
    /// No coordinator has listened, or it cannot be written.
    pub fn admit(&self, ends_unix_seconds: u64) -> Result<Invite, AccessError> {
        let door = self.door()?;
        let secret = Secret::generate()?;
        let name = format!("{INVITES_FOLDER}/{}.json", secret.digest());
        let invite = Invite::new(&door.address, &door.run, door.fingerprint, secret)?;
        self.write(&name, &InviteFile { ends_unix_seconds })?;
        Ok(invite)
    }

    /// Asks that the machine may not come back.
    ///
    /// # Errors
    /// No coordinator has listened, or it cannot be written.
    pub fn revoke(&self, fingerprint: ContentHash) -> Result<(), AccessError> {
        self.door()?;
        self.write(&format!("{REVOKED_FOLDER}/{fingerprint}"), &())
    }

    /// Forgets an invite, if it is still there.
    pub fn forget_invite(&self, digest: ContentHash) {
        // What stays is in the log as used, or has ended.
        let _ = fs::remove_file(self.root.join(INVITES_FOLDER).join(format!("{digest}.json")));
    }

    /// What the files ask for. One that is none of these is passed over.
    ///
    /// # Errors
    /// A folder cannot be read.
    pub fn read(&self) -> Result<Access, AccessError> {
        let mut access = Access::default();
        for name in self.names(INVITES_FOLDER)? {
            let digest = name.strip_suffix(".json").and_then(|digest| digest.parse::<ContentHash>().ok());
            let Some(digest) = digest else { continue };
            if let Ok(InviteFile { ends_unix_seconds }) = self.read_file(&format!("{INVITES_FOLDER}/{name}")) {
                access.invites.insert(digest, ends_unix_seconds);
            }
        }
        access.revoked.extend(self.names(REVOKED_FOLDER)?.iter().filter_map(|name| name.parse::<ContentHash>().ok()));
        Ok(access)
    }

    fn names(&self, folder: &str) -> Result<Vec<String>, AccessError> {
        let path = self.root.join(folder);
        let entries = match fs::read_dir(&path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(source) => return Err(AccessError::File { path, source }),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        Ok(names.take(FILES_MAX).collect())
    }

    fn known<T: DeserializeOwned>(&self, name: &str) -> Result<T, AccessError> {
        if !self.root.join(name).exists() {
            return Err(AccessError::NeverServed { path: self.run.clone() });
        }
        self.read_file(name)
    }

    fn read_file<T: DeserializeOwned>(&self, name: &str) -> Result<T, AccessError> {
        let path = self.root.join(name);
        let mut text = Vec::new();
        let read = File::open(&path).and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut text));
        read.map_err(|source| AccessError::File { path: path.clone(), source })?;
        serde_json::from_slice(&text).map_err(|error| AccessError::Damaged { path, reason: error.to_string() })
    }

    /// Writes a file for its owner alone, whole or not at all.
    fn write(&self, name: &str, content: &impl Serialize) -> Result<(), AccessError> {
        let path = self.root.join(name);
        let unfinished = path.with_extension(format!("unfinished-{}", std::process::id()));
        let written = || {
            let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
            file.write_all(&serde_json::to_vec(content)?)?;
            fs::rename(&unfinished, &path)
        };
        written().map_err(|source| AccessError::File { path: path.clone(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn door() -> Door {
        Door { address: "10.0.0.1:7447".to_owned(), run: "run".to_owned(), fingerprint: ContentHash::of(b"door") }
    }

    #[test]
    fn what_is_asked_for_is_read_back_and_only_its_owner_may_read_it() {
        let place = tempfile::tempdir().unwrap();
        let folder = AccessFolder::of(place.path());
        assert!(matches!(folder.door(), Err(AccessError::NeverServed { .. })));
        assert!(matches!(folder.admit(5), Err(AccessError::NeverServed { .. })));
        assert_eq!(folder.read().unwrap(), Access::default());
        folder.open(&door()).unwrap();
        let invite = folder.admit(5).unwrap();
        assert_eq!(
            (invite.address(), invite.run(), invite.fingerprint()),
            ("10.0.0.1:7447", "run", door().fingerprint)
        );
        let (digest, revoked) = (invite.secret().digest(), ContentHash::of(b"site"));
        folder.revoke(revoked).unwrap();
        let access = folder.read().unwrap();
        assert_eq!(access, Access { invites: [(digest, 5)].into(), revoked: [revoked].into() });
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&place.path().join("access/invites")), 0o700);
        assert_eq!(mode(&place.path().join(format!("access/invites/{digest}.json"))), 0o600);
        folder.forget_invite(digest);
        assert!(folder.read().unwrap().invites.is_empty());
    }

    #[test]
    fn files_that_are_none_of_these_are_passed_over() {
        let place = tempfile::tempdir().unwrap();
        let folder = AccessFolder::of(place.path());
        folder.open(&door()).unwrap();
        let (invites, revoked) = (place.path().join("access/invites"), place.path().join("access/revoked"));
        let digest = ContentHash::of(b"secret");
        for (name, text) in [("x.json", "{}"), (&format!("{digest}.json"), "{\"ends_unix_seconds\":-1}"), (".x", "")] {
            fs::write(invites.join(name), text).unwrap();
        }
        fs::write(revoked.join("nobody"), "").unwrap();
        assert_eq!(folder.read().unwrap(), Access::default());
        fs::write(place.path().join("access/members.json"), "[").unwrap();
        assert!(matches!(folder.members(), Err(AccessError::Damaged { .. })));
    }
}
