//! `quarry tenant`.

use serde_json::json;

use super::Failure;
use super::args::TenantCommand;
use super::output::Console;
use super::table::{table, time_ms};
use crate::control::Client;

pub(super) async fn run(
    client: &Client,
    command: TenantCommand,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        TenantCommand::Create { tenant } => {
            let made = client.create_tenant(&tenant).await?;
            console.show(&made, |made| format!("tenant {} is there", made.name))
        }
        TenantCommand::List => {
            let list = client.list_tenants().await?;
            console.show(&list, |list| {
                if list.tenants.is_empty() {
                    return "there are no tenants; make one with `quarry tenant create NAME`"
                        .to_owned();
                }
                let row = |t: &crate::control::TenantInfo| {
                    vec![t.name.clone(), time_ms(t.created_ms).unwrap_or_default()]
                };
                table(
                    &["TENANT", "CREATED"],
                    &list.tenants.iter().map(row).collect::<Vec<_>>(),
                )
            })
        }
        TenantCommand::Delete { tenant, purge } => {
            client.delete_tenant(&tenant, purge).await?;
            console.show(&json!({ "tenant": tenant, "done": "deleted" }), |_| {
                format!("tenant {tenant} is deleted")
            })
        }
    }
}
