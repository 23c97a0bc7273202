//! Bearer tokens: made, known again, revoked.
//!
//! A token is `qry_<id>_<secret>`; its id is `<tenant>.<serial>`, or `OPERATOR.<serial>`, which no tenant is
//! called. The store keeps the SHA-256 of the whole, in one object a holder, so that whoever reads the
//! store can use none of them. A secret of 256 random bits needs no slow hash.
//!
//! **Invariants:**
//! - a token works [`FRESH`] at most after another host revoked it, at once not after this one did; and, while
//!   the store does not answer, [`STALE_MAX`] after it was last seen there;
//! - a tenant's are of the one tenant that they were made for, and no later one's of its name, whenever the store
//!   takes the record of them;
//! - what unknown tokens make the daemon do is bounded by [`WRONG_BURST`] and [`WRONG_PAUSE`] for each address
//!   that they come from, and by [`LOADS_AT_ONCE`] for all.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use quarry_objfmt::record::{
    TOKEN_NOTE_BYTES_MAX, TOKENS_KIND, TOKENS_MAX, TokenRecord, TokensRecord, decode_record,
    encode_record,
};
use quarry_objfmt::{TenantName, keys};
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom as _, SystemRandom};
use subtle::ConstantTimeEq as _;
use tokio::sync::Semaphore;

use super::super::token::{TokenInfo, TokenMade, TokenRole, TokenSpec};
use super::super::{ApiError, ApiResult, Kind};
use super::{Caller, Role};
use crate::engine::{now_ms, tenant_record};
use crate::places::holder;
use crate::store::{Store, StoreError, Tag};

/// How long a holder's tokens are known without asking the store again.
const FRESH: Duration = Duration::from_secs(30);
/// The same, while the store does not answer.
const STALE_MAX: Duration = Duration::from_secs(15 * 60);
/// A token that is not among its holder's is asked for again when they were read so long ago: it may be new.
const AGAIN: Duration = Duration::from_secs(2);
/// How long after a failure the store is not asked again on behalf of who is known.
const REST: Duration = Duration::from_secs(2);
/// Holders whose tokens are kept in memory, and as many who have none.
const HOLDERS_MAX: u64 = 1024;
/// Holders whose tokens are being read at once.
const LOADS_AT_ONCE: usize = 4;
/// Wrong tokens from one address at once.
const WRONG_BURST: u32 = 20;
/// And then one in so much time.
const WRONG_PAUSE: Duration = Duration::from_secs(1);
/// Addresses whose wrong tokens are counted.
const ADDRESSES_MAX: u64 = 4096;
/// How often a change is tried that others get ahead of.
const CHANGE_TRIES: usize = 8;

const PREFIX: &str = "qry_";
const OPERATOR: &str = "OPERATOR";
/// Random bytes of a serial: no two of a holder's are the same by chance.
const SERIAL_BYTES: usize = 10;
/// Random bytes of a secret.
const SECRET_BYTES: usize = 32;
/// Longest text that is looked at.
const TEXT_BYTES_MAX: usize = 256;

/// A tenant, or the operators.
type Holder = Option<TenantName>;

/// Why nobody is known by a token.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Unknown {
    /// It is no token, or none any more.
    Wrong,
    /// Too many wrong ones came from there.
    TooMany,
    /// Whether it is one cannot be found out.
    Away(ApiError),
}

/// All tokens, as far as they were needed.
pub struct Tokens {
    store: Arc<dyn Store>,
    held: moka::sync::Cache<Holder, Arc<Held>>,
    none: moka::sync::Cache<Holder, ()>,
    wrong: moka::sync::Cache<IpAddr, Arc<Mutex<Allowance>>>,
    loads: Semaphore,
    failed_at: Mutex<Option<Instant>>,
    /// Held by who changes tokens, so that what is remembered is in the order of the changes.
    changing: tokio::sync::Mutex<()>,
    /// How many changes there were: what was read before one is not remembered after it.
    changes: Mutex<u64>,
    fresh: Duration,
    again: Duration,
    stale_max: Duration,
}

/// A holder's tokens as they were in the store.
struct Held {
    record: TokensRecord,
    at: Instant,
}

/// What a holder's tokens say of one.
enum Verdict {
    Known(TokenRole),
    Refused,
    Missing,
}

impl Held {
    fn judge(&self, token: &Token<'_>, now_ms: u64) -> Verdict {
        let mut all = self.record.tokens.iter();
        let Some(found) = all.find(|t| t.serial == token.serial) else {
            return Verdict::Missing;
        };
        let same = bool::from(found.sha256.as_bytes().ct_eq(token.sha256.as_bytes()));
        let ended = found.expires_ms.is_some_and(|at| at <= now_ms);
        match TokenRole::named(&found.role) {
            Some(role)
                if same && !ended && (role == TokenRole::Operator) == token.holder.is_none() =>
            {
                Verdict::Known(role)
            }
            _ => Verdict::Refused,
        }
    }
}

/// How many wrong tokens an address may still send.
struct Allowance {
    left: u32,
    since: Instant,
}

/// A token's text, taken apart.
struct Token<'a> {
    holder: Holder,
    id: &'a str,
    serial: &'a str,
    sha256: String,
}

impl<'a> Token<'a> {
    fn parse(text: &'a str) -> Option<Self> {
        if text.len() > TEXT_BYTES_MAX {
            return None;
        }
        let (id, _) = text.strip_prefix(PREFIX)?.rsplit_once('_')?;
        let (holder, serial) = take_apart(id)?;
        let sha256 = sha256(text);
        Some(Self {
            holder,
            id,
            serial,
            sha256,
        })
    }
}

/// The holder and the serial of an id.
fn take_apart(id: &str) -> Option<(Holder, &str)> {
    let (holder, serial) = id.rsplit_once('.')?;
    let holder = match holder {
        OPERATOR => None,
        tenant => Some(TenantName::new(tenant).ok()?),
    };
    (!serial.is_empty()).then_some((holder, serial))
}

fn id_of(holder: &Holder, serial: &str) -> String {
    match holder {
        Some(tenant) => format!("{tenant}.{serial}"),
        None => format!("{OPERATOR}.{serial}"),
    }
}

fn sha256(text: &str) -> String {
    let digest = digest(&SHA256, text.as_bytes());
    digest.as_ref().iter().map(|b| format!("{b:02x}")).collect()
}

/// So many random bytes, in digits and small letters, five bits each.
fn random(bytes: usize) -> ApiResult<String> {
    const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
    let mut room = vec![0; bytes];
    let filled = SystemRandom::new().fill(&mut room);
    filled.map_err(|_| ApiError::internal("the system gives no random numbers"))?;
    let mut text = String::new();
    let (mut bits, mut count) = (0_u32, 0);
    for byte in room {
        bits = (bits << 8) | u32::from(byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(char::from(DIGITS[(bits >> count) as usize & 31]));
        }
        bits &= (1 << count) - 1;
    }
    if count > 0 {
        text.push(char::from(DIGITS[(bits << (5 - count)) as usize & 31]));
    }
    Ok(text)
}

fn no_token(id: &str) -> ApiError {
    let message = format!("there is no token {id}");
    ApiError::new(
        Kind::NotFound,
        message,
        "`quarry token list` shows those that are there",
    )
}

impl Tokens {
    /// Those in `store`, which answers soon or says that it does not.
    #[must_use]
    pub fn new(store: Arc<dyn Store>) -> Self {
        Self {
            store,
            held: moka::sync::Cache::new(HOLDERS_MAX),
            none: moka::sync::Cache::builder()
                .max_capacity(HOLDERS_MAX)
                .time_to_live(AGAIN)
                .build(),
            wrong: moka::sync::Cache::builder()
                .max_capacity(ADDRESSES_MAX)
                .time_to_idle(WRONG_PAUSE * WRONG_BURST)
                .build(),
            loads: Semaphore::new(LOADS_AT_ONCE),
            failed_at: Mutex::default(),
            changing: tokio::sync::Mutex::default(),
            changes: Mutex::default(),
            fresh: FRESH,
            again: AGAIN,
            stale_max: STALE_MAX,
        }
    }

    /// Who bears the token `text`, coming from `from`.
    pub(super) async fn bearer(&self, text: &str, from: IpAddr) -> Result<Caller, Unknown> {
        let Some(token) = Token::parse(text) else {
            return Err(self.wrong(from));
        };
        match self.judge(&token, from).await? {
            TokenRole::Operator => Ok(Caller::Operator {
                who: format!("token {}", token.id),
            }),
            role => Ok(Caller::Tenant {
                tenant: token.holder.ok_or(Unknown::Wrong)?,
                role: if role == TokenRole::Admin {
                    Role::Admin
                } else {
                    Role::Read
                },
                token: token.id.to_owned(),
            }),
        }
    }

    async fn judge(&self, token: &Token<'_>, from: IpAddr) -> Result<TokenRole, Unknown> {
        let held = self.held.get(&token.holder);
        if let Some(held) = held.as_ref().filter(|held| held.at.elapsed() < self.fresh) {
            match held.judge(token, now_ms()) {
                Verdict::Known(role) => return Ok(role),
                Verdict::Missing if held.at.elapsed() >= self.again => {}
                Verdict::Missing | Verdict::Refused => return Err(self.wrong(from)),
            }
        } else if held.is_none() && self.none.contains_key(&token.holder) {
            return Err(self.wrong(from));
        }
        // What it was known for a while ago, should the store not answer.
        let known = held
            .filter(|held| held.at.elapsed() < self.stale_max)
            .and_then(|held| match held.judge(token, now_ms()) {
                Verdict::Known(role) => Some(role),
                _ => None,
            });
        if let Some(role) = known
            && self.failed_at.lock().is_some_and(|at| at.elapsed() < REST)
        {
            return Ok(role);
        }
        if known.is_none() && !self.may_ask(from) {
            return Err(Unknown::TooMany);
        }
        match self.load(&token.holder).await {
            Ok(Some(held)) => match held.judge(token, now_ms()) {
                Verdict::Known(role) => Ok(role),
                Verdict::Missing | Verdict::Refused => Err(self.wrong(from)),
            },
            Ok(None) => Err(self.wrong(from)),
            Err(error) => known.ok_or(Unknown::Away(error)),
        }
    }

    /// A holder's tokens from the store; none if it has none.
    async fn load(&self, holder: &Holder) -> ApiResult<Option<Arc<Held>>> {
        // The semaphore is never closed.
        let _place = self.loads.acquire().await;
        if let Some(held) = self
            .held
            .get(holder)
            .filter(|held| held.at.elapsed() < self.again)
        {
            return Ok(Some(held));
        }
        let (at, changes) = (Instant::now(), *self.changes.lock());
        match self.read(holder).await {
            Ok(found) => {
                let held = found.map(|(record, _)| Arc::new(Held { record, at }));
                let now = self.changes.lock();
                if *now == changes {
                    self.remember(holder, held.clone());
                }
                Ok(held)
            }
            Err(error) => {
                tracing::warn!(%error, "a token cannot be looked up");
                // One record that is damaged says nothing of the others'.
                if error.kind == Kind::Unavailable {
                    *self.failed_at.lock() = Some(Instant::now());
                }
                let message = "the store does not say whose token this is";
                Err(ApiError::new(
                    Kind::Unavailable,
                    message,
                    "try again when it answers",
                ))
            }
        }
    }

    fn remember(&self, holder: &Holder, held: Option<Arc<Held>>) {
        match held {
            Some(held) => {
                self.held.insert(holder.clone(), held);
                self.none.invalidate(holder);
            }
            None => {
                self.held.invalidate(holder);
                self.none.insert(holder.clone(), ());
            }
        }
    }

    /// Remembers what a change made of a holder's tokens, or that they are gone.
    fn changed(&self, holder: &Holder, held: Option<Arc<Held>>) {
        let mut changes = self.changes.lock();
        *changes += 1;
        self.remember(holder, held);
    }

    /// A holder's tokens, and where they were seen. Those of a tenant of this name that is no more do not count: a PUT
    /// whose answer was lost may come after it was deleted, and made anew.
    async fn read(&self, holder: &Holder) -> ApiResult<Option<(TokensRecord, Tag)>> {
        let Some((mut record, tag)) = self.stored(holder).await? else {
            return Ok(None);
        };
        if let (Some(tenant), Some(created_ms)) = (holder, record.tenant_created_ms) {
            let is_of_it = match tenant_record(&*self.store, tenant).await {
                Ok((now, _)) => now.created_ms == created_ms,
                Err(error) if error.kind == Kind::NotFound => false,
                // It says nothing of another tenant: see `hand_on`.
                Err(error) if error.kind == Kind::Damaged => true,
                Err(error) => return Err(error),
            };
            if !is_of_it {
                record.tokens.clear();
                record.tenant_created_ms = None;
            }
        }
        Ok(Some((record, tag)))
    }

    async fn stored(&self, holder: &Holder) -> ApiResult<Option<(TokensRecord, Tag)>> {
        let key = keys::tokens_key(holder.as_ref());
        match self.store.get(&key).await {
            Ok((bytes, tag)) => match decode_record(TOKENS_KIND, &bytes) {
                Ok(record) => Ok(Some((record, tag))),
                Err(error) => {
                    let remedy = "restore the object from a copy, or delete it and make new tokens";
                    Err(ApiError::new(
                        Kind::Damaged,
                        format!("{key}: {error}"),
                        remedy,
                    ))
                }
            },
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Counts a wrong token.
    fn wrong(&self, from: IpAddr) -> Unknown {
        let allowance = self.allowance(from);
        let mut allowance = allowance.lock();
        allowance.left = allowance.left.saturating_sub(1);
        Unknown::Wrong
    }

    /// Whether the store may be asked about what this address sends.
    fn may_ask(&self, from: IpAddr) -> bool {
        self.allowance(from).lock().left > 0
    }

    fn allowance(&self, from: IpAddr) -> Arc<Mutex<Allowance>> {
        let from = holder(from);
        let fresh = || {
            Arc::new(Mutex::new(Allowance {
                left: WRONG_BURST,
                since: Instant::now(),
            }))
        };
        let found = self.wrong.get_with(from, fresh);
        {
            let mut allowance = found.lock();
            let pauses = allowance.since.elapsed().as_secs() / WRONG_PAUSE.as_secs();
            if let Ok(pauses @ 1..) = u32::try_from(pauses) {
                allowance.left = allowance.left.saturating_add(pauses).min(WRONG_BURST);
                allowance.since = Instant::now();
            }
        }
        found
    }

    /// Changes a holder's tokens. `change` is called again when others got ahead, and says whether there is
    /// something to write.
    ///
    /// The order: the object, then the memory. *Crash in between: the store says it, and who asks next.*
    async fn change(
        &self,
        holder: &Holder,
        mut change: impl FnMut(&mut TokensRecord) -> ApiResult<bool>,
    ) -> ApiResult<()> {
        let key = keys::tokens_key(holder.as_ref());
        let _turn = self.changing.lock().await;
        for _ in 0..CHANGE_TRIES {
            let at = Instant::now();
            let found = self.read(holder).await?;
            let (mut record, tag) = match found {
                Some((record, tag)) => (record, Some(tag)),
                None => (TokensRecord::default(), None),
            };
            if !change(&mut record)? {
                self.changed(holder, Some(Arc::new(Held { record, at })));
                return Ok(());
            }
            record.revision += 1;
            let bytes = encode_record(TOKENS_KIND, &record);
            let bytes = Bytes::from(bytes.map_err(|e| ApiError::internal(e.to_string()))?);
            let written = match &tag {
                Some(tag) => self.store.replace(&key, bytes, tag).await,
                None => self.store.create(&key, bytes).await,
            };
            match written {
                Ok(_) => {
                    self.changed(holder, Some(Arc::new(Held { record, at })));
                    return Ok(());
                }
                // Somebody quicker, or our own try, its answer lost: the record tells.
                Err(StoreError::Exists { .. } | StoreError::Changed { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let message = "others change these tokens all the time";
        Err(ApiError::new(Kind::Unavailable, message, "try again"))
    }

    /// Makes a token, of the tenant that was created then. Its text is in the answer and nowhere else.
    ///
    /// # Errors
    /// [`Kind::Conflict`] if the holder has as many as it may have.
    pub async fn create(
        &self,
        spec: &TokenSpec,
        tenant_created_ms: Option<u64>,
    ) -> ApiResult<TokenMade> {
        spec.check()?;
        let holder = spec.tenant.clone();
        let serial = random(SERIAL_BYTES)?;
        let id = id_of(&holder, &serial);
        let text = format!("{PREFIX}{id}_{}", random(SECRET_BYTES)?);
        let record = TokenRecord {
            serial: serial.clone(),
            sha256: sha256(&text),
            role: spec.role.as_str().to_owned(),
            created_ms: now_ms(),
            expires_ms: spec.expires_ms,
            note: spec.note.clone(),
            ..TokenRecord::default()
        };
        let info = tell(&holder, &record);
        self.change(&holder, |all| {
            if all.tokens.iter().any(|t| t.serial == serial) {
                return Ok(false);
            }
            if all.tokens.len() >= TOKENS_MAX {
                let now = now_ms();
                all.tokens
                    .retain(|t| t.expires_ms.is_none_or(|at| at > now));
            }
            if all.tokens.len() >= TOKENS_MAX {
                let message = format!("there are {TOKENS_MAX} tokens already");
                let remedy = "revoke some with `quarry token revoke`";
                return Err(ApiError::new(Kind::Conflict, message, remedy));
            }
            all.tenant_created_ms = all.tenant_created_ms.or(tenant_created_ms);
            all.tokens.push(record.clone());
            Ok(true)
        })
        .await?;
        Ok(TokenMade { token: text, info })
    }

    /// The tokens of a tenant; without one, of the operators and all tenants.
    ///
    /// # Errors
    /// The store's.
    pub async fn list(&self, tenant: Option<&TenantName>) -> ApiResult<Vec<TokenInfo>> {
        let mut holders = vec![tenant.cloned()];
        if tenant.is_none() {
            let found = self.store.list(keys::TOKENS_PREFIX).await?;
            let names = found
                .iter()
                .filter_map(|key| key.strip_prefix(keys::TOKENS_PREFIX));
            holders.extend(
                names
                    .filter_map(|name| TenantName::new(name).ok())
                    .map(Some),
            );
        }
        let mut all = Vec::new();
        for holder in holders {
            let Some((record, _)) = self.read(&holder).await? else {
                continue;
            };
            all.extend(record.tokens.iter().map(|token| tell(&holder, token)));
        }
        Ok(all)
    }

    /// Takes a token back.
    ///
    /// # Errors
    /// [`Kind::NotFound`] if there is none of this id.
    pub async fn revoke(&self, id: &str) -> ApiResult<()> {
        // The whole token will do: whoever has it by mistake wants it gone.
        let id = without_secret(id);
        let (holder, serial) = take_apart(id).ok_or_else(|| no_token(id))?;
        let mut was_there = false;
        self.change(&holder, |all| {
            let before = all.tokens.len();
            all.tokens.retain(|t| t.serial != serial);
            let is_there = all.tokens.len() < before;
            // The second time it may be gone by our own first try.
            was_there |= is_there;
            Ok(is_there)
        })
        .await?;
        was_there.then_some(()).ok_or_else(|| no_token(id))
    }

    /// Makes a tenant's tokens count whenever it was created: it is the same one, whose damaged record is made anew, or is put
    /// back. The next that is made binds them again.
    ///
    /// # Errors
    /// The store's.
    pub async fn hand_on(&self, tenant: &TenantName) -> ApiResult<()> {
        let holder = Some(tenant.clone());
        self.change(&holder, |all| Ok(all.tenant_created_ms.take().is_some()))
            .await
    }

    /// Takes all of a tenant's tokens back: it is gone, or not there yet.
    ///
    /// # Errors
    /// The store's.
    pub async fn forget(&self, tenant: &TenantName) -> ApiResult<()> {
        let holder = Some(tenant.clone());
        let _turn = self.changing.lock().await;
        let deleted = self.store.delete(&keys::tokens_key(Some(tenant))).await;
        self.changed(&holder, None);
        Ok(deleted?)
    }
}

/// A token's id, of the id or of the whole token.
pub(super) fn without_secret(text: &str) -> &str {
    match text.strip_prefix(PREFIX) {
        Some(token) => token.rsplit_once('_').map_or(token, |(id, _)| id),
        None => text,
    }
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

fn tell(holder: &Holder, token: &TokenRecord) -> TokenInfo {
    TokenInfo {
        id: id_of(holder, &token.serial),
        tenant: holder.as_ref().map(ToString::to_string),
        role: token.role.clone(),
        created_ms: token.created_ms,
        expires_ms: token.expires_ms,
        expired: token.expires_ms.is_some_and(|at| at <= now_ms()),
        note: token.note.clone(),
    }
}

/// Refuses a note that does not fit its record.
pub(in super::super) fn check_note(note: &str) -> ApiResult<()> {
    if note.len() <= TOKEN_NOTE_BYTES_MAX && !note.chars().any(char::is_control) {
        return Ok(());
    }
    let remedy = format!("write at most {TOKEN_NOTE_BYTES_MAX} bytes without control characters");
    Err(ApiError::invalid("a token cannot have this note", remedy))
}

#[cfg(test)]
mod tests;
