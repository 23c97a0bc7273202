//! `quarry token`.

use serde_json::json;

use super::Failure;
use super::args::TokenCommand;
use super::output::Console;
use super::table::{table, time_ms};
use crate::control::{Client, TokenInfo, TokenRole, TokenSpec};
use crate::engine::now_ms;

pub(super) async fn run(
    client: &Client,
    command: TokenCommand,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        TokenCommand::Create {
            tenant,
            role,
            operator: _,
            expires,
            note,
        } => {
            let spec = TokenSpec {
                tenant,
                role: role.unwrap_or(TokenRole::Operator),
                expires_ms: expires.map(|span| now_ms().saturating_add(span)),
                note: note.unwrap_or_default(),
            };
            let made = client.create_token(&spec).await?;
            // Alone on its line, for `> file`.
            console.show(&made, |made| made.token.clone())
        }
        TokenCommand::List { tenant } => {
            let list = client.list_tokens(tenant.as_ref()).await?;
            console.show(&list, |list| {
                if list.tokens.is_empty() {
                    return "there are no tokens; make one with `quarry token create`".to_owned();
                }
                let heads = ["TOKEN", "TENANT", "ROLE", "CREATED", "ENDS", "NOTE"];
                table(&heads, &list.tokens.iter().map(row).collect::<Vec<_>>())
            })
        }
        TokenCommand::Revoke { token } => {
            client.revoke_token(&token).await?;
            console.show(&json!({ "token": token, "done": "revoked" }), |_| {
                format!("token {token} is revoked")
            })
        }
    }
}

fn row(token: &TokenInfo) -> Vec<String> {
    let ends = match token.expires_ms {
        _ if token.expired => "ended".to_owned(),
        Some(at) => time_ms(at).unwrap_or_default(),
        None => "never".to_owned(),
    };
    vec![
        token.id.clone(),
        token.tenant.clone().unwrap_or_default(),
        token.role.clone(),
        time_ms(token.created_ms).unwrap_or_default(),
        ends,
        token.note.clone(),
    ]
}
