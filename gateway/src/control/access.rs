//! Who calls, and what that lets them reach.
//!
//! Owns the roles, how a caller is told, and the guard before every endpoint ([`guard`]). Does not own the
//! endpoints ([`endpoints`](super::endpoints)), which say what role they need.
//!
//! Invariants:
//! - a handler gets its engine from the guard alone ([`Allowed`]), and a tenant's is one that knows no other
//!   tenant ([`Tenanted`](tenanted::Tenanted)): a handler cannot reach what its caller may not;
//! - what a tenant is told of another's thing is what it is told of one that is not there, and that before
//!   anybody looks whether it is.

mod audit;
pub(super) mod guard;
mod peer;
mod tenanted;
pub(super) mod tokens;

#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use quarry_config::TenantAttach;
use quarry_objfmt::TenantName;

use self::tokens::Unknown;
use super::api::Refused;
use super::{ApiError, ApiResult, Kind};
use crate::places::Places;
use crate::store::Store;
pub use audit::{Audit, AuditStats};
pub use guard::{Allowed, Guard, Operating};
pub use peer::{Operators, Peer};
pub use tokens::Tokens;

/// What a tenant's token lets its bearer do.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Role {
    /// Look.
    Read,
    /// Look, and change the tenant's volumes.
    Admin,
}

/// Who calls.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Caller {
    /// Who runs the daemon: everything, of all tenants.
    Operator {
        /// As the log names it.
        who: String,
    },
    /// A tenant: what is its own.
    Tenant {
        /// Which.
        tenant: TenantName,
        /// What it may do.
        role: Role,
        /// The id of its token.
        token: String,
    },
}

impl Caller {
    /// The tenant that it is confined to.
    #[must_use]
    pub const fn tenant(&self) -> Option<&TenantName> {
        match self {
            Self::Operator { .. } => None,
            Self::Tenant { tenant, .. } => Some(tenant),
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Operator { who } => f.write_str(who),
            Self::Tenant { token, .. } => write!(f, "token {token}"),
        }
    }
}

/// The least that an endpoint asks of its caller.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Needs {
    /// Nothing: it says nothing about anybody.
    Nothing,
    /// [`Role::Read`] of the tenant.
    Read,
    /// [`Role::Admin`] of the tenant.
    Admin,
    /// An operator.
    Operator,
}

impl Needs {
    /// Whether `caller` has it.
    #[must_use]
    pub const fn met_by(self, caller: &Caller) -> bool {
        match (self, caller) {
            (Self::Nothing | Self::Read, _) | (_, Caller::Operator { .. }) => true,
            (Self::Admin, Caller::Tenant { role, .. }) => matches!(role, Role::Admin),
            (Self::Operator, Caller::Tenant { .. }) => false,
        }
    }

    /// As people are told.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Nothing => "nobody in particular",
            Self::Read => "tenant-read",
            Self::Admin => "tenant-admin",
            Self::Operator => "operator",
        }
    }
}

/// How callers are told, what they may do, and the record of what they did.
#[derive(Debug, Default)]
pub struct Access {
    operators: Operators,
    tenant_attach: TenantAttach,
    tokens: Option<Tokens>,
    audit: Option<Audit>,
    calls: Places<TenantName>,
}

impl Access {
    /// As configured, with the tokens in `store`, which answers soon or says that it does not.
    ///
    /// # Errors
    /// If an operator is named whom the host does not know, or the audit log cannot be written and must be.
    pub fn new(
        config: &quarry_config::Access,
        store: Arc<dyn Store>,
        data_dir: &Path,
    ) -> ApiResult<Self> {
        Ok(Self {
            tokens: Some(Tokens::new(store)),
            ..Self::without_tokens(config, data_dir)?
        })
    }

    /// As configured, and nobody has a token.
    ///
    /// # Errors
    /// As [`Access::new`].
    pub fn without_tokens(config: &quarry_config::Access, data_dir: &Path) -> ApiResult<Self> {
        let path = config.audit_log.clone();
        let path = path.unwrap_or_else(|| data_dir.join("audit.jsonl"));
        Ok(Self {
            operators: Operators::find(&config.operators)?,
            tenant_attach: config.tenant_attach,
            tokens: None,
            audit: Some(Audit::open(path, config.audit_required)?),
            calls: Places::default(),
        })
    }

    /// The tokens.
    ///
    /// # Errors
    /// If there are none here.
    pub fn tokens(&self) -> ApiResult<&Tokens> {
        self.tokens.as_ref().ok_or_else(|| {
            ApiError::new(
                Kind::Unsupported,
                "there are no tokens here",
                "ask a daemon",
            )
        })
    }

    /// What the audit log counts.
    #[must_use]
    pub fn audit_stats(&self) -> AuditStats {
        self.audit.as_ref().map(Audit::stats).unwrap_or_default()
    }

    /// Why the audit log cannot be written, if it cannot.
    #[must_use]
    pub fn audit_problem(&self) -> Option<String> {
        self.audit.as_ref().and_then(Audit::problem)
    }

    /// Who sends a request.
    async fn identify(&self, parts: &Parts) -> Result<Caller, Refused> {
        // Set by who has told already; no client can.
        if let Some(caller) = parts.extensions.get::<Caller>() {
            return Ok(caller.clone());
        }
        match Peer::of_request(parts) {
            peer @ Peer::Unix { uid, pid, .. } if self.operators.have(peer) => {
                let who = format!("uid {uid} (process {})", pid.unwrap_or_default());
                Ok(Caller::Operator { who })
            }
            Peer::Unix { uid, .. } => {
                let message = format!("user {uid} is no operator of this daemon");
                let remedy =
                    "run this as root or as the daemon's user, or have access.operators name you";
                Err(ApiError::new(Kind::Denied, message, remedy).into())
            }
            Peer::Tcp(address) => self.bearer(parts, address.ip()).await,
            Peer::Unknown => {
                let message = "the kernel does not say who calls";
                Err(ApiError::new(Kind::Denied, message, "see the daemon's log").into())
            }
        }
    }

    async fn bearer(&self, parts: &Parts, from: IpAddr) -> Result<Caller, Refused> {
        let unauthorized = |message: &str| {
            let remedy =
                "send one that `quarry token create` made, as `Authorization: Bearer TOKEN`";
            let error = ApiError::new(Kind::Denied, message, remedy);
            Refused(StatusCode::UNAUTHORIZED, error)
        };
        let Some(header) = parts.headers.get(header::AUTHORIZATION) else {
            return Err(unauthorized("a token is needed"));
        };
        let (scheme, token) = header
            .to_str()
            .ok()
            .and_then(|h| h.split_once(' '))
            .unwrap_or_default();
        if !scheme.eq_ignore_ascii_case("bearer") {
            return Err(unauthorized("a bearer token is needed"));
        }
        self.tokens()?
            .bearer(token.trim(), from)
            .await
            .map_err(|unknown| match unknown {
                Unknown::Wrong => unauthorized("the token is not known here, or no longer"),
                Unknown::TooMany => {
                    let message = "too many unknown tokens came from this address";
                    let error = ApiError::new(Kind::Unavailable, message, "try again in a minute");
                    Refused(StatusCode::TOO_MANY_REQUESTS, error)
                }
                Unknown::Away(error) => error.into(),
            })
    }
}
