//! Tokens: known, wrong, many, and with a store that is away.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use async_trait::async_trait;
use quarry_objfmt::record::{TENANT_KIND, TenantRecord};

use super::*;
use crate::store::{FolderStore, Operation};

const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A folder that counts its reads, can be away, and remembers what was made in it, to be made once more.
#[derive(Debug)]
struct Flaky {
    inner: FolderStore,
    away: AtomicBool,
    reads: AtomicU64,
    made: Mutex<Vec<(String, Bytes)>>,
}

impl Flaky {
    fn check(&self, operation: Operation, key: &str) -> Result<(), StoreError> {
        if !self.away.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(StoreError::Unavailable {
            operation,
            key: key.to_owned(),
            reason: "it is away".to_owned(),
        })
    }
}

#[async_trait]
impl Store for Flaky {
    async fn get(&self, key: &str) -> Result<(Bytes, Tag), StoreError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        self.check(Operation::Get, key)?;
        self.inner.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }
    async fn get_prefix(&self, key: &str, len: u64) -> Result<Bytes, StoreError> {
        self.inner.get_prefix(key, len).await
    }
    async fn create(&self, key: &str, body: Bytes) -> Result<Tag, StoreError> {
        self.check(Operation::Create, key)?;
        self.made.lock().push((key.to_owned(), body.clone()));
        self.inner.create(key, body).await
    }
    async fn replace(&self, key: &str, body: Bytes, seen: &Tag) -> Result<Tag, StoreError> {
        self.check(Operation::Replace, key)?;
        self.inner.replace(key, body, seen).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.inner.list(prefix).await
    }
    fn describe(&self) -> String {
        self.inner.describe()
    }
}

struct Site {
    _dir: tempfile::TempDir,
    store: Arc<Flaky>,
}

impl Site {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let inner = FolderStore::open(dir.path(), true).unwrap();
        let store = Flaky {
            inner,
            away: AtomicBool::new(false),
            reads: AtomicU64::new(0),
            made: Mutex::default(),
        };
        Self {
            _dir: dir,
            store: Arc::new(store),
        }
    }

    /// The tenant `acme` is the one that was created then.
    async fn make_acme(&self, created_ms: u64) {
        let record = TenantRecord {
            name: "acme".to_owned(),
            created_ms,
            ..TenantRecord::default()
        };
        let bytes = encode_record(TENANT_KIND, &record).unwrap();
        let folder = &self.store.inner;
        folder.delete("tenants/acme").await.unwrap();
        folder.create("tenants/acme", bytes.into()).await.unwrap();
    }

    /// A host of its own.
    fn tokens(&self) -> Tokens {
        Tokens::new(Arc::clone(&self.store) as _)
    }

    fn set_away(&self, away: bool) {
        self.store.away.store(away, Ordering::SeqCst);
    }

    fn reads(&self) -> u64 {
        self.store.reads.load(Ordering::SeqCst)
    }
}

fn spec(tenant: &str) -> TokenSpec {
    TokenSpec {
        tenant: Some(TenantName::new(tenant).unwrap()),
        role: TokenRole::Admin,
        expires_ms: None,
        note: "for \"tests\"".to_owned(),
    }
}

#[tokio::test]
async fn token_is_known_by_every_host_until_it_is_revoked() {
    let site = Site::new();
    let (here, elsewhere) = (site.tokens(), site.tokens());
    let made = here.create(&spec("acme"), None).await.unwrap();
    assert!(
        made.token.len() > 52 && made.token.starts_with("qry_acme."),
        "{}",
        made.token
    );
    for tokens in [&here, &elsewhere] {
        let caller = tokens.bearer(&made.token, HERE).await.unwrap();
        assert_eq!(caller.tenant().map(TenantName::as_str), Some("acme"));
    }
    let listed = elsewhere.list(None).await.unwrap();
    assert_eq!(listed.first(), Some(&made.info));
    elsewhere.revoke(&made.info.id).await.unwrap();
    assert_eq!(
        elsewhere.bearer(&made.token, HERE).await,
        Err(Unknown::Wrong)
    );
    assert!(
        here.bearer(&made.token, HERE).await.is_ok(),
        "as long as it is fresh"
    );
    assert_eq!(
        elsewhere.revoke(&made.info.id).await.unwrap_err().kind,
        Kind::NotFound
    );
    let late = Tokens {
        fresh: Duration::ZERO,
        again: Duration::ZERO,
        ..site.tokens()
    };
    assert_eq!(late.bearer(&made.token, HERE).await, Err(Unknown::Wrong));
}

#[tokio::test]
async fn secret_is_in_no_object_and_every_other_text_is_wrong() {
    let site = Site::new();
    let tokens = site.tokens();
    let made = tokens.create(&spec("acme"), None).await.unwrap();
    let (_, secret) = made.token.rsplit_once('_').unwrap();
    let (bytes, _) = site.store.get("tokens/acme").await.unwrap();
    assert!(!String::from_utf8_lossy(&bytes).contains(secret));
    let mut last = made.token.clone();
    last.pop();
    let other_holder = made.token.replace("acme", "zebra");
    let operator = made.token.replace("acme", "OPERATOR");
    for text in [
        &*last,
        &format!("{last}A"),
        &other_holder,
        &operator,
        "qry__",
        "",
        &"x".repeat(9999),
    ] {
        assert_eq!(
            tokens.bearer(text, HERE).await,
            Err(Unknown::Wrong),
            "{text}"
        );
    }
    assert!(tokens.bearer(&made.token, HERE).await.is_ok());
}

/// The first of two tries to write the record takes effect when the tenant and its tokens are gone, and there is another
/// tenant of its name.
#[tokio::test]
async fn token_of_a_tenant_that_is_gone_is_not_the_next_ones_when_its_record_comes_late() {
    let site = Site::new();
    let acme = TenantName::new("acme").unwrap();
    site.make_acme(1).await;
    let old = site.tokens().create(&spec("acme"), Some(1)).await.unwrap();
    assert!(site.tokens().bearer(&old.token, HERE).await.is_ok());
    site.tokens().forget(&acme).await.unwrap();
    site.make_acme(2).await;
    let (key, body) = site.store.made.lock().remove(0);
    site.store.inner.create(&key, body).await.unwrap();
    assert_eq!(
        site.tokens().bearer(&old.token, HERE).await,
        Err(Unknown::Wrong)
    );
    assert_eq!(site.tokens().list(Some(&acme)).await.unwrap(), []);
    let new = site.tokens().create(&spec("acme"), Some(2)).await.unwrap();
    assert!(site.tokens().bearer(&new.token, HERE).await.is_ok());
    assert_eq!(
        site.tokens().bearer(&old.token, HERE).await,
        Err(Unknown::Wrong)
    );
    assert_eq!(site.tokens().list(Some(&acme)).await.unwrap(), [new.info]);
}

#[tokio::test]
async fn tokens_of_a_tenant_whose_damaged_record_is_made_anew_stay() {
    let site = Site::new();
    let acme = TenantName::new("acme").unwrap();
    site.tokens().hand_on(&acme).await.unwrap();
    assert_eq!(site.tokens().list(Some(&acme)).await.unwrap(), []);
    site.make_acme(1).await;
    let made = site.tokens().create(&spec("acme"), Some(1)).await.unwrap();
    let folder = &site.store.inner;
    folder.delete("tenants/acme").await.unwrap();
    folder
        .create("tenants/acme", b"damaged"[..].into())
        .await
        .unwrap();
    assert!(site.tokens().bearer(&made.token, HERE).await.is_ok());
    site.tokens().hand_on(&acme).await.unwrap();
    // By another, who was quicker; or the record of before was put back.
    site.make_acme(3).await;
    assert!(site.tokens().bearer(&made.token, HERE).await.is_ok());
}

/// A record that somebody moves to the operators' place makes no operators.
#[tokio::test]
async fn tenants_token_at_the_operators_place_opens_nothing() {
    let site = Site::new();
    let text = "qry_OPERATOR.aaaa_bbbb";
    let token = TokenRecord {
        serial: "aaaa".to_owned(),
        sha256: sha256(text),
        role: "admin".to_owned(),
        ..TokenRecord::default()
    };
    let record = TokensRecord {
        tokens: vec![token],
        ..TokensRecord::default()
    };
    let bytes = encode_record(TOKENS_KIND, &record).unwrap();
    site.store
        .create("operator-tokens", bytes.into())
        .await
        .unwrap();
    assert_eq!(site.tokens().bearer(text, HERE).await, Err(Unknown::Wrong));
}

#[tokio::test]
async fn store_that_is_away_leaves_known_tokens_and_tells_of_others_that_it_cannot_say() {
    let site = Site::new();
    let tokens = Tokens {
        fresh: Duration::ZERO,
        again: Duration::ZERO,
        ..site.tokens()
    };
    let acme = tokens.create(&spec("acme"), None).await.unwrap().token;
    let other = site
        .tokens()
        .create(&spec("other"), None)
        .await
        .unwrap()
        .token;
    site.set_away(true);
    assert!(tokens.bearer(&acme, HERE).await.is_ok());
    assert!(tokens.bearer(&acme, HERE).await.is_ok());
    let away = tokens.bearer(&other, HERE).await.unwrap_err();
    assert!(matches!(away, Unknown::Away(_)), "{away:?}");
    let late = Tokens {
        stale_max: Duration::ZERO,
        ..tokens
    };
    let away = late.bearer(&acme, HERE).await.unwrap_err();
    assert!(matches!(away, Unknown::Away(_)), "{away:?}");
    site.set_away(false);
    assert!(late.bearer(&other, HERE).await.is_ok());
}

#[tokio::test]
async fn wrong_tokens_cost_the_store_a_bounded_number_of_reads_and_others_nothing() {
    let site = Site::new();
    let tokens = site.tokens();
    let acme = tokens.create(&spec("acme"), None).await.unwrap().token;
    let begun = site.reads();
    let mut refused = 0;
    for n in 0..1000 {
        let text = format!("qry_nobody{n}.aaaa_bbbb");
        match tokens.bearer(&text, HERE).await.unwrap_err() {
            Unknown::TooMany => refused += 1,
            other => assert_eq!(other, Unknown::Wrong),
        }
    }
    let reads = site.reads() - begun;
    assert!(reads <= u64::from(WRONG_BURST) + 5, "{reads} reads");
    assert!(refused > 900, "{refused} refused");
    assert!(
        tokens.bearer(&acme, HERE).await.is_ok(),
        "who is known is not refused for his neighbours"
    );
    let elsewhere = IpAddr::from([192, 0, 2, 1]);
    let text = "qry_nobody.aaaa_bbbb";
    assert_eq!(tokens.bearer(text, elsewhere).await, Err(Unknown::Wrong));
    let begun = site.reads();
    for _ in 0..WRONG_BURST {
        drop(tokens.bearer(text, elsewhere).await);
    }
    assert_eq!(
        site.reads(),
        begun,
        "nobody's tokens are remembered for a while"
    );
}

#[tokio::test]
async fn tokens_made_at_once_on_two_hosts_are_all_there_and_no_more_than_fit() {
    let site = Site::new();
    let (a, b) = (site.tokens(), site.tokens());
    for _ in 0..10 {
        let (spec, other) = (spec("acme"), spec("acme"));
        let (first, second) = tokio::join!(a.create(&spec, None), b.create(&other, None));
        first.unwrap();
        second.unwrap();
    }
    assert_eq!(a.list(None).await.unwrap().len(), 20);
    for _ in 20..TOKENS_MAX {
        a.create(&spec("acme"), None).await.unwrap();
    }
    let error = b.create(&spec("acme"), None).await.unwrap_err();
    assert_eq!(error.kind, Kind::Conflict, "{error}");
    a.forget(&TenantName::new("acme").unwrap()).await.unwrap();
    assert_eq!(b.list(None).await.unwrap(), []);
}

#[test]
fn random_text_has_five_bits_a_letter() {
    let (a, b) = (random(SECRET_BYTES).unwrap(), random(SECRET_BYTES).unwrap());
    assert_eq!((a.len(), random(SERIAL_BYTES).unwrap().len()), (52, 16));
    assert_ne!(a, b);
    assert!(
        a.bytes()
            .all(|c| c.is_ascii_lowercase() || (b'2'..=b'7').contains(&c))
    );
}
