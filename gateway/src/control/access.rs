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

pub(super) mod guard;
mod peer;
mod tenanted;

#[cfg(test)]
mod tests;

use std::fmt;

use axum::extract::ConnectInfo;
use axum::http::request::Parts;
use quarry_config::TenantAttach;
use quarry_objfmt::TenantName;

use super::{ApiError, ApiResult, Kind};
pub use guard::{Allowed, Guard};
pub use peer::{Operators, Peer};

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

/// How callers are told, and what they may do.
#[derive(Debug, Default)]
pub struct Access {
    operators: Operators,
    tenant_attach: TenantAttach,
    calls: guard::Calls,
}

impl Access {
    /// As configured.
    ///
    /// # Errors
    /// If an operator is named whom the host does not know.
    pub fn new(config: &quarry_config::Access) -> ApiResult<Self> {
        Ok(Self {
            operators: Operators::find(&config.operators)?,
            tenant_attach: config.tenant_attach,
            calls: guard::Calls::default(),
        })
    }

    /// Who sends a request.
    async fn identify(&self, parts: &Parts) -> ApiResult<Caller> {
        // Set by who has told already; no client can.
        if let Some(caller) = parts.extensions.get::<Caller>() {
            return Ok(caller.clone());
        }
        let peer = parts.extensions.get::<ConnectInfo<Peer>>();
        match peer.map(|ConnectInfo(peer)| peer) {
            Some(peer @ Peer::Unix { uid, pid, .. }) if self.operators.have(peer) => {
                let who = format!("uid {uid} (process {})", pid.unwrap_or_default());
                Ok(Caller::Operator { who })
            }
            Some(Peer::Unix { uid, .. }) => {
                let message = format!("user {uid} is no operator of this daemon");
                let remedy =
                    "run this as root or as the daemon's user, or have access.operators name you";
                Err(ApiError::new(Kind::Denied, message, remedy))
            }
            Some(Peer::Tcp(_) | Peer::Unknown) | None => Err(ApiError::new(
                Kind::Denied,
                "nobody is known here",
                "use the daemon's unix socket",
            )),
        }
    }
}
