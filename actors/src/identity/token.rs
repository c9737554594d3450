//! Join tokens: short-lived, good once, known to the one node that made them.
//!
//! A token's text is `ingle-` and the base64url of: version u8 · SHA-256 of the authority's certificate · issuing
//! node's id · token id (8) · secret (16) · expiry (seconds since 1970, u64 little endian). The secret proves itself
//! by HMAC and never crosses the wire.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use hmac::{Hmac, KeyInit, Mac};
use ingle_protocol::NodeId;
use rand::RngCore;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use time::OffsetDateTime;

use crate::platform::{read_optional, write_private};

const PREFIX: &str = "ingle-";
const VERSION: u8 = 1;
const LENGTH: usize = 1 + 32 + 16 + 8 + 16 + 8;
/// Used and expired tokens are remembered so long, to be told apart from unknown ones.
const REMEMBERED: Duration = Duration::from_secs(24 * 3600);
/// The most tokens that wait to be used.
const MOST_TOKENS: usize = 256;

/// A text that is not a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is not a join token ({0}); copy the whole line that `ingle token` printed")]
pub struct TokenError(&'static str);

/// What the text of a token says.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the authority's certificate.
    pub authority_hash: [u8; 32],
    /// The node that made it and alone can redeem it.
    pub issuer: NodeId,
    /// Which token.
    pub id: [u8; 8],
    /// What must be proved and never sent.
    pub secret: [u8; 16],
    /// Seconds since 1970, by the issuer's clock.
    pub expires_at: u64,
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "JoinToken({:02x?} of {}, secret)", self.id, self.issuer)
    }
}

impl JoinToken {
    /// The text to hand to the other machine.
    pub fn to_text(&self) -> String {
        let mut bytes = Vec::with_capacity(LENGTH);
        bytes.push(VERSION);
        bytes.extend(self.authority_hash);
        bytes.extend(self.issuer.0);
        bytes.extend(self.id);
        bytes.extend(self.secret);
        bytes.extend(self.expires_at.to_le_bytes());
        format!("{PREFIX}{}", BASE64.encode(bytes))
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let encoded = text.trim().strip_prefix(PREFIX).ok_or(TokenError("it does not begin with `ingle-`"))?;
        let bytes = BASE64.decode(encoded).map_err(|_| TokenError("it is cut or altered"))?;
        let (version, rest) = bytes.split_first().ok_or(TokenError("it is empty"))?;
        if *version != VERSION {
            return Err(TokenError("it was made by a newer version of Ingle"));
        }
        let cut = TokenError("it is cut or altered");
        let (authority_hash, rest) = rest.split_first_chunk::<32>().ok_or(cut.clone())?;
        let (issuer, rest) = rest.split_first_chunk::<16>().ok_or(cut.clone())?;
        let (id, rest) = rest.split_first_chunk::<8>().ok_or(cut.clone())?;
        let (secret, rest) = rest.split_first_chunk::<16>().ok_or(cut.clone())?;
        let expires_at = <[u8; 8]>::try_from(rest).map_err(|_| cut)?;
        Ok(Self {
            authority_hash: *authority_hash,
            issuer: NodeId(*issuer),
            id: *id,
            secret: *secret,
            expires_at: u64::from_le_bytes(expires_at),
        })
    }
}

/// HMAC-SHA256 under the token's secret over what ties the request to this very TLS session: a proof that was seen
/// is worth nothing elsewhere.
pub fn join_proof(secret: &[u8; 16], exporter: &[u8; 32], csr: &[u8], name: &str, guest: bool) -> [u8; 32] {
    keyed(secret, exporter, csr, name, guest).finalize().into_bytes().into()
}

fn keyed(secret: &[u8; 16], exporter: &[u8; 32], csr: &[u8], name: &str, guest: bool) -> Hmac<Sha256> {
    let mut mac = Hmac::<Sha256>::new(&hmac_key(secret));
    mac.update(b"ingle join v1");
    mac.update(exporter);
    for part in [csr, name.as_bytes()] {
        mac.update(&(part.len() as u64).to_le_bytes());
        mac.update(part);
    }
    mac.update(&[u8::from(guest)]);
    mac
}

/// HMAC pads keys to its block with zeros; done here so that the key's type has the block's fixed length.
fn hmac_key(secret: &[u8; 16]) -> hmac::digest::Key<Hmac<Sha256>> {
    let mut key = hmac::digest::Key::<Hmac<Sha256>>::default();
    key[..16].copy_from_slice(secret);
    key
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// The cluster that it was made for: a node that joins another one must not let people into that.
    authority: String,
    secret: String,
    expires_at: u64,
    used: bool,
}

/// Why a token is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RedeemError {
    /// Unknown, or with a wrong proof: which of the two is not for the other side to know.
    Unknown,
    /// Its time is over.
    Expired,
    /// It was used.
    Used,
    /// The book cannot be written, so the token stays unused.
    NotStored,
}

/// The tokens that this node made, on disk.
#[derive(Debug)]
pub struct TokenBook {
    path: PathBuf,
    /// Held from reading to writing: two joiners must not both find a token unused.
    writing: Mutex<()>,
}

impl TokenBook {
    /// The book of a state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self { path: state_dir.join("tokens.json"), writing: Mutex::default() }
    }

    /// Every call reads and writes the file: tokens are rare, and a token that was made while no node ran counts.
    fn read(&self) -> io::Result<BTreeMap<String, Entry>> {
        match read_optional(&self.path)? {
            Some(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
            None => Ok(BTreeMap::new()),
        }
    }

    fn write(&self, mut entries: BTreeMap<String, Entry>, now: OffsetDateTime) -> io::Result<()> {
        let now = now.unix_timestamp().max(0) as u64;
        entries.retain(|_, entry| now < entry.expires_at.saturating_add(REMEMBERED.as_secs()));
        write_private(&self.path, &serde_json::to_vec_pretty(&entries).map_err(io::Error::other)?)
    }

    /// A fresh token, stored before it is returned.
    pub fn mint(
        &self,
        authority_hash: [u8; 32],
        issuer: NodeId,
        lifetime: Duration,
        now: OffsetDateTime,
        random: &mut impl RngCore,
    ) -> io::Result<JoinToken> {
        let mut token = JoinToken { authority_hash, issuer, id: [0; 8], secret: [0; 16], expires_at: 0 };
        random.fill_bytes(&mut token.id);
        random.fill_bytes(&mut token.secret);
        token.expires_at = (now.unix_timestamp().max(0) as u64).saturating_add(lifetime.as_secs());
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = self.read()?;
        let now_s = now.unix_timestamp().max(0) as u64;
        if entries.values().filter(|entry| !entry.used && entry.expires_at > now_s).count() >= MOST_TOKENS {
            return Err(io::Error::other("too many tokens wait to be used; wait until some expire"));
        }
        let entry = Entry {
            authority: BASE64.encode(authority_hash),
            secret: BASE64.encode(token.secret),
            expires_at: token.expires_at,
            used: false,
        };
        entries.insert(BASE64.encode(token.id), entry);
        self.write(entries, now)?;
        Ok(token)
    }

    /// Takes a token of this cluster if its proof is right and `may_enter` has nothing against its holder, and
    /// stores that it is used before it says so. Whoever does not know the secret learns nothing from `may_enter`.
    pub fn redeem<E: From<RedeemError>>(
        &self,
        authority_hash: [u8; 32],
        id: [u8; 8],
        proof: [u8; 32],
        bound_to: (&[u8; 32], &[u8], &str, bool),
        now: OffsetDateTime,
        may_enter: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), E> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut entries = self.read().map_err(|_| RedeemError::NotStored)?;
        let entry = entries.get_mut(&BASE64.encode(id)).ok_or(RedeemError::Unknown)?;
        if entry.authority != BASE64.encode(authority_hash) {
            return Err(RedeemError::Unknown.into());
        }
        let secret = BASE64.decode(&entry.secret).ok().and_then(|s| <[u8; 16]>::try_from(s).ok());
        let secret = secret.ok_or(RedeemError::Unknown)?;
        let (exporter, csr, name, guest) = bound_to;
        // Constant-time comparison.
        keyed(&secret, exporter, csr, name, guest).verify_slice(&proof).map_err(|_| RedeemError::Unknown)?;
        if entry.used {
            return Err(RedeemError::Used.into());
        }
        if now.unix_timestamp().max(0) as u64 >= entry.expires_at {
            return Err(RedeemError::Expired.into());
        }
        may_enter()?;
        entry.used = true;
        self.write(entries, now).map_err(|_| RedeemError::NotStored.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HOUR: Duration = Duration::from_secs(3600);

    #[test]
    fn a_token_is_good_once_for_its_time_and_for_what_it_was_proved_over() {
        let folder = tempfile::tempdir().unwrap();
        let book = TokenBook::new(folder.path());
        let now = OffsetDateTime::now_utc();
        let token = book.mint([1; 32], NodeId([2; 16]), HOUR, now, &mut rand::rng()).unwrap();
        let proof = join_proof(&token.secret, &[9; 32], b"csr", "mini", false);
        let bound = (&[9; 32], &b"csr"[..], "mini", false);
        for other in [
            (&[8; 32], &b"csr"[..], "mini", false),
            (&[9; 32], &b"other"[..], "mini", false),
            (&[9; 32], &b"csr"[..], "tower", false),
            (&[9; 32], &b"csr"[..], "mini", true),
        ] {
            let redeemed = book.redeem([1; 32], token.id, proof, other, now, || panic!("asked without a proof"));
            assert_eq!(redeemed, Err(RedeemError::Unknown));
        }
        let redeem = |hash, id, now, verdict: Result<(), RedeemError>| {
            // A new book each time, as a new process has: what counts is the file.
            TokenBook::new(folder.path()).redeem(hash, id, proof, bound, now, || verdict)
        };
        assert_eq!(redeem([1; 32], [0; 8], now, Ok(())), Err(RedeemError::Unknown));
        assert_eq!(redeem([2; 32], token.id, now, Ok(())), Err(RedeemError::Unknown), "another cluster's token");
        assert_eq!(redeem([1; 32], token.id, now + 2 * HOUR, Ok(())), Err(RedeemError::Expired));
        // Who may not enter for another reason keeps the token.
        assert_eq!(redeem([1; 32], token.id, now, Err(RedeemError::NotStored)), Err(RedeemError::NotStored));
        assert_eq!(redeem([1; 32], token.id, now, Ok(())), Ok(()));
        assert_eq!(redeem([1; 32], token.id, now, Ok(())), Err(RedeemError::Used));
    }

    #[test]
    fn of_many_at_once_one_gets_in() {
        let folder = tempfile::tempdir().unwrap();
        let book = TokenBook::new(folder.path());
        let now = OffsetDateTime::now_utc();
        let token = book.mint([1; 32], NodeId([2; 16]), HOUR, now, &mut rand::rng()).unwrap();
        let proof = join_proof(&token.secret, &[9; 32], b"csr", "mini", false);
        let redeem = || {
            book.redeem([1; 32], token.id, proof, (&[9; 32], b"csr", "mini", false), now, || Ok::<_, RedeemError>(()))
        };
        let admitted = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..8).map(|_| scope.spawn(redeem)).collect();
            tries.into_iter().map(|t| t.join().unwrap()).filter(Result::is_ok).count()
        });
        assert_eq!(admitted, 1);
    }

    #[test]
    fn the_text_keeps_everything_and_says_nothing_in_debug() {
        let token = JoinToken {
            authority_hash: [1; 32],
            issuer: NodeId([2; 16]),
            id: [3; 8],
            secret: [0xab; 16],
            expires_at: 1 << 40,
        };
        let text = token.to_text();
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains("171"), "{token:?}");
        assert!(text[..text.len() - 4].parse::<JoinToken>().is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text: String, tail: String) {
            let _ = text.parse::<JoinToken>();
            let _ = format!("{PREFIX}{tail}").parse::<JoinToken>();
        }
    }
}
