//! Tokens, over the wire and at their routes.

use axum::extract::Path;
use axum::extract::rejection::PathRejection;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Json};
use quarry_objfmt::TenantName;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::access::tokens::check_note;
use super::access::{Allowed, Operating};
use super::api::{Body, Query, Refused, json, not_utf8, whole};
use super::openapi::Name;
use super::page::listed;
use super::page::{TenantPageQuery, tenant_page};
use super::{ApiError, ApiResult};
use crate::engine::now_ms;

/// What a token lets its bearer do.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum TokenRole {
    /// Look at what is the tenant's.
    Read,
    /// Look at and change what is the tenant's.
    Admin,
    /// Everything.
    #[value(skip)]
    Operator,
}

impl TokenRole {
    const ALL: [Self; 3] = [Self::Read, Self::Admin, Self::Operator];

    /// As it is written.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Admin => "admin",
            Self::Operator => "operator",
        }
    }

    /// The one of this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|role| role.as_str() == name)
    }
}

/// Request: make a token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenSpec {
    /// Whose; none: an operator's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Name>")]
    pub tenant: Option<TenantName>,
    /// What it lets its bearer do.
    pub role: TokenRole,
    /// When it ends; none: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// For people.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub note: String,
}

impl TokenSpec {
    /// Refuses what no token is.
    pub(super) fn check(&self) -> ApiResult<()> {
        if (self.role == TokenRole::Operator) != self.tenant.is_none() {
            let message =
                "a tenant's token has the role read or admin, and an operator's is no tenant's";
            return Err(ApiError::invalid(
                message,
                "give a tenant and a role, or say that it is an operator's",
            ));
        }
        if self.expires_ms.is_some_and(|at| at <= now_ms()) {
            return Err(ApiError::invalid(
                "it would have ended already",
                "choose a time to come",
            ));
        }
        check_note(&self.note)
    }
}

/// A token, without its secret.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TokenInfo {
    /// Its id.
    pub id: String,
    /// Whose; none: an operator's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tenant: Option<String>,
    /// What it lets its bearer do.
    pub role: String,
    /// When it was made.
    pub created_ms: u64,
    /// When it ends; none: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expires_ms: Option<u64>,
    /// Whether it has ended.
    pub expired: bool,
    /// For people.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub note: String,
}

/// Answer: a token that was made.
#[derive(Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct TokenMade {
    /// What its bearer sends. It cannot be had again.
    pub token: String,
    /// The token.
    #[serde(flatten)]
    pub info: TokenInfo,
}

/// Without the secret.
impl std::fmt::Debug for TokenMade {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.info.fmt(f)
    }
}

/// Answer: tokens.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize, JsonSchema)]
pub struct TokenList {
    /// The operators', then by tenant; the oldest first.
    pub tokens: Vec<TokenInfo>,
    /// What to ask for the next page after; none: there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
}

listed!(TokenList, tokens);

pub(super) async fn create(
    Allowed(engine): Allowed,
    Operating(access): Operating,
    body: Body,
) -> Result<impl IntoResponse, Refused> {
    let spec: TokenSpec = json(body)?;
    spec.check()?;
    let made = whole(async move {
        let tenant_created_ms = match &spec.tenant {
            Some(tenant) => Some(engine.show_tenant(tenant).await?.created_ms),
            None => None,
        };
        access.tokens()?.create(&spec, tenant_created_ms).await
    });
    Ok((StatusCode::CREATED, Json(made.await?)))
}

pub(super) async fn list(
    Operating(access): Operating,
    asked: Query<TenantPageQuery>,
) -> ApiResult<Json<TokenList>> {
    let (tenant, page) = tenant_page(asked)?;
    let all = access.tokens()?.list(tenant.as_ref()).await?;
    let place = |t: &TokenInfo| {
        let tenant = t.tenant.as_deref().unwrap_or_default();
        format!("{tenant} {:020} {}", t.created_ms, t.id)
    };
    let (tokens, next) = page.cut(all, place);
    Ok(Json(TokenList { tokens, next }))
}

pub(super) async fn revoke(
    Operating(access): Operating,
    path: Result<Path<String>, PathRejection>,
) -> ApiResult<StatusCode> {
    let Path(id) = path.map_err(|_| not_utf8())?;
    whole(async move { access.tokens()?.revoke(&id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
