//! Who a peer is: an Ed25519 key with a self-signed certificate, known by the BLAKE3 of the certificate.
//!
//! There is no authority: a fingerprint is learnt from an invite or from the coordinator's list of members and is then
//! pinned. Names, validity dates and chains in certificates are therefore not looked at; the proof of possession of
//! the key (the TLS 1.3 handshake signature) always is.

use crate::limits::IDENTITY_FILE_BYTES_MAX;
use crate::tls;
use base::{ContentHash, Hint};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The file in an identity's folder: private key and certificate together, so that no crash can part them.
pub const IDENTITY_FILE: &str = "identity.pem";

/// A private key and its certificate, ready for TLS. Cheap to clone; its `Debug` shows the fingerprint only.
#[derive(Clone)]
pub struct Identity {
    fingerprint: ContentHash,
    server: Arc<rustls::ServerConfig>,
    client: tls::ClientTemplate,
}

/// Why an identity could not be made, read or kept.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The file system refused.
    #[error("identity '{}': {source}", path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others on this machine may read the private key.
    #[error("identity '{}' has mode {mode:03o}: others can read its private key", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Not a key with its certificate.
    #[error("identity '{}' is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The generator of keys failed.
    #[error("cannot generate a key: {0}")]
    Generate(String),
}

impl Hint for IdentityError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::File { path, .. } => {
                Some(format!("check owner and free space: `ls -ld '{0}'; df '{0}'`", path.display()))
            }
            Self::Exposed { path, .. } => Some(format!("`chmod 600 '{}'`", path.display())),
            Self::Damaged { path, .. } => Some(format!(
                "move it away with `mv '{0}' '{0}.damaged'`; a new one is made at the next start, and the site must be \
                 invited again",
                path.display()
            )),
            Self::Generate(_) => None,
        }
    }
}

impl Identity {
    /// A new key and certificate, kept in memory only.
    ///
    /// # Errors
    /// The system's random numbers are not available.
    pub fn generate() -> Result<Self, IdentityError> {
        Self::from_pem(&generate_pem()?).map_err(IdentityError::Generate)
    }

    /// The identity kept in `folder`, made there with mode 0600 where there is none. Of several processes that start at
    /// once, all get the same one.
    ///
    /// # Errors
    /// The file cannot be read or written, is damaged, or others may read it.
    pub fn load_or_create(folder: &Path) -> Result<Self, IdentityError> {
        let path = folder.join(IDENTITY_FILE);
        let at = |source| IdentityError::File { path: path.clone(), source };
        let pem = match read(&path) {
            Err(IdentityError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                create(folder, &path, &generate_pem()?).map_err(at)?;
                read(&path)?
            }
            other => other?,
        };
        Self::from_pem(&pem).map_err(|reason| IdentityError::Damaged { path, reason })
    }

    /// What others know this identity by: the BLAKE3 of the certificate's DER.
    pub fn fingerprint(&self) -> ContentHash {
        self.fingerprint
    }

    pub(crate) fn from_pem(pem: &[u8]) -> Result<Self, String> {
        let certificate = CertificateDer::from_pem_slice(pem).map_err(|error| format!("certificate: {error}"))?;
        let key = PrivateKeyDer::from_pem_slice(pem).map_err(|error| format!("private key: {error}"))?;
        let describe = |error: rustls::Error| error.to_string();
        Ok(Self {
            fingerprint: ContentHash::of(&certificate),
            server: tls::server_config(certificate.clone(), key.clone_key()).map_err(describe)?,
            client: tls::ClientTemplate::new(certificate, key).map_err(describe)?,
        })
    }

    pub(crate) fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.server.clone()
    }

    pub(crate) fn client_config(&self, server: ContentHash) -> Arc<rustls::ClientConfig> {
        self.client.pinned_to(server)
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "Identity({})", self.fingerprint.short())
    }
}

pub(crate) fn generate_pem() -> Result<Vec<u8>, IdentityError> {
    let describe = |error: rcgen::Error| IdentityError::Generate(error.to_string());
    let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(describe)?;
    let mut parameters = rcgen::CertificateParams::new([tls::SERVER_NAME.to_owned()]).map_err(describe)?;
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let certificate = parameters.self_signed(&key).map_err(describe)?;
    Ok((key.serialize_pem() + &certificate.pem()).into_bytes())
}

fn read(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let at = |source| IdentityError::File { path: path.to_owned(), source };
    let file = File::open(path).map_err(at)?;
    refuse_exposed(path, &file.metadata().map_err(at)?)?;
    let mut pem = Vec::new();
    file.take(IDENTITY_FILE_BYTES_MAX + 1).read_to_end(&mut pem).map_err(at)?;
    if pem.len() as u64 > IDENTITY_FILE_BYTES_MAX {
        let reason = format!("it is longer than {IDENTITY_FILE_BYTES_MAX} bytes");
        return Err(IdentityError::Damaged { path: path.to_owned(), reason });
    }
    Ok(pem)
}

#[cfg(unix)]
fn refuse_exposed(path: &Path, metadata: &fs::Metadata) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    match metadata.permissions().mode() & 0o777 {
        mode if mode & 0o077 != 0 => Err(IdentityError::Exposed { path: path.to_owned(), mode }),
        _ => Ok(()),
    }
}

#[cfg(not(unix))]
fn refuse_exposed(_path: &Path, _metadata: &fs::Metadata) -> Result<(), IdentityError> {
    Ok(())
}

/// Writes under a temporary name (mode 0600), syncs, and gives it its name unless another process was faster.
fn create(folder: &Path, path: &Path, pem: &[u8]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let mut file = tempfile::Builder::new().prefix(".identity-").tempfile_in(folder)?;
    file.write_all(pem)?;
    file.as_file().sync_all()?;
    match file.persist_noclobber(path) {
        Ok(_) => crate::blob::file::sync_folder(folder),
        Err(error) if error.error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        Err(error) => Err(error.error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_made_once_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let nested = folder.path().join("keys");
        let first = Identity::load_or_create(&nested).unwrap();
        assert_eq!(Identity::load_or_create(&nested).unwrap().fingerprint(), first.fingerprint());
        assert_ne!(Identity::generate().unwrap().fingerprint(), first.fingerprint());
        assert_eq!(fs::read_dir(&nested).unwrap().count(), 1, "no temporary file is left");
    }

    #[test]
    fn processes_that_start_together_agree() {
        let folder = tempfile::tempdir().unwrap();
        let start = std::sync::Barrier::new(8);
        let fingerprints: Vec<_> = std::thread::scope(|scope| {
            let load = || {
                start.wait();
                Identity::load_or_create(folder.path()).unwrap().fingerprint()
            };
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(load)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(fingerprints.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[cfg(unix)]
    #[test]
    fn the_key_is_private_and_an_exposed_one_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        Identity::load_or_create(folder.path()).unwrap();
        let path = folder.path().join(IDENTITY_FILE);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Identity::load_or_create(folder.path()).unwrap_err();
        assert!(matches!(error, IdentityError::Exposed { mode: 0o644, .. }), "{error}");
        assert!(error.hint().unwrap().starts_with("`chmod 600 "));
    }

    #[test]
    fn damage_is_named_and_never_overwritten() {
        let folder = tempfile::tempdir().unwrap();
        Identity::load_or_create(folder.path()).unwrap();
        let path = folder.path().join(IDENTITY_FILE);
        let good = fs::read(&path).unwrap();
        let other = generate_pem().unwrap();
        let certificate_at = |pem: &[u8]| pem.windows(17).position(|w| w == b"BEGIN CERTIFICATE").unwrap() - 5;
        let foreign_key = [&other[..certificate_at(&other)], &good[certificate_at(&good)..]].concat();
        let too_long = [good.clone(), vec![b'\n'; IDENTITY_FILE_BYTES_MAX as usize]].concat();
        for damaged in [Vec::new(), good[..good.len() / 2].to_vec(), foreign_key, too_long] {
            fs::write(&path, &damaged).unwrap();
            let error = Identity::load_or_create(folder.path()).unwrap_err();
            assert!(matches!(error, IdentityError::Damaged { .. }), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damaged);
        }
    }

    #[test]
    fn debug_shows_no_key() {
        let shown = format!("{:?}", Identity::generate().unwrap());
        assert!(shown.len() < 30, "{shown}");
    }
}
