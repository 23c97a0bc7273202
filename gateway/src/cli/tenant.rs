//! `quarry tenant`.

use quarry_objfmt::{Suspended, TenantSettings};
use serde_json::json;

use super::Failure;
use super::args::TenantCommand;
use super::output::Console;
use super::table::{bytes, fields, table, time_ms};
use crate::control::{Client, StoreRequests, TenantInfo, TenantSpec, patched};

pub(super) async fn run(
    client: &Client,
    command: TenantCommand,
    console: &mut Console<'_>,
) -> Result<(), Failure> {
    match command {
        TenantCommand::Create { tenant, settings } => {
            let settings = patched(&TenantSettings::default(), &settings.patch())?;
            let name = tenant;
            let made = client.create_tenant(&TenantSpec { name, settings }).await?;
            console.show(&made, |made| format!("tenant {} is there", made.name))
        }
        TenantCommand::List => {
            let list = client.list_tenants().await?;
            console.show(&list, |list| {
                if list.tenants.is_empty() {
                    return "there are no tenants; make one with `quarry tenant create NAME`"
                        .to_owned();
                }
                let row = |t: &TenantInfo| {
                    vec![
                        t.name.clone(),
                        time_ms(t.created_ms).unwrap_or_default(),
                        state(t).to_owned(),
                    ]
                };
                table(
                    &["TENANT", "CREATED", "STATE"],
                    &list.tenants.iter().map(row).collect::<Vec<_>>(),
                )
            })
        }
        TenantCommand::Show { tenant } => {
            let info = client.show_tenant(&tenant).await?;
            console.show(&info, |info| fields(&rows(info)))
        }
        TenantCommand::Update { tenant, settings } => {
            let patch = settings.patch();
            if patch.is_empty() {
                let message = format!("nothing of tenant {tenant} is named that is to be changed");
                let remedy = "give a flag, as `quarry tenant update --help` shows them";
                return Err(Failure::new(Failure::USAGE, message, remedy));
            }
            let info = client.update_tenant(&tenant, &patch).await?;
            console.show(&info, |info| fields(&rows(info)))
        }
        TenantCommand::Suspend { tenant, how } => {
            let info = client.suspend_tenant(&tenant, Some(how)).await?;
            console.show(&info, |info| {
                format!("tenant {} is suspended ({})", info.name, state(info))
            })
        }
        TenantCommand::Resume { tenant } => {
            let info = client.suspend_tenant(&tenant, None).await?;
            console.show(&info, |info| format!("tenant {} goes on", info.name))
        }
        TenantCommand::Delete { tenant, purge } => {
            client.delete_tenant(&tenant, purge).await?;
            console.show(&json!({ "tenant": tenant, "done": "deleted" }), |_| {
                format!("tenant {tenant} is deleted")
            })
        }
    }
}

const fn state(tenant: &TenantInfo) -> &'static str {
    match tenant.settings.suspended {
        None => "active",
        Some(Suspended::ReadOnly) => "read-only",
        Some(Suspended::Stall) => "stalled",
    }
}

/// All about a tenant, what it has beside what it may have.
fn rows(info: &TenantInfo) -> Vec<(&'static str, Option<String>)> {
    let settings = &info.settings;
    let (usage, rates, store) = (info.usage, &settings.rates, settings.store.as_ref());
    let number = |n: u64| n.to_string();
    let rate = |bytes_a_second: u64| format!("{}/s", bytes(bytes_a_second));
    let has = |has: Option<u64>, max: Option<u64>, show: fn(u64) -> String| match (has, max) {
        (Some(has), Some(max)) => Some(format!("{} of {}", show(has), show(max))),
        (has, max) => has.or(max).map(show),
    };
    vec![
        ("tenant", Some(info.name.clone())),
        ("created", time_ms(info.created_ms)),
        ("state", Some(state(info).to_owned())),
        ("store", info.store.as_ref().map(|s| s.url.clone())),
        (
            "store's state",
            info.store.as_ref().and_then(|s| s.last_error.clone()),
        ),
        ("credentials", store.and_then(|s| s.credentials.clone())),
        (
            "volumes",
            has(usage.map(|u| u.volumes), settings.volumes_max, number),
        ),
        (
            "snapshots",
            has(usage.map(|u| u.snapshots), settings.snapshots_max, number),
        ),
        (
            "provisioned",
            has(
                usage.map(|u| u.provisioned_bytes),
                settings.provisioned_bytes_max,
                bytes,
            ),
        ),
        (
            "stored",
            has(
                usage.map(|u| u.stored_bytes),
                settings.stored_bytes_max,
                bytes,
            ),
        ),
        ("IOPS at most", rates.iops.map(number)),
        ("IOPS burst", rates.iops_burst.map(number)),
        ("bandwidth at most", rates.bandwidth_bytes.map(rate)),
        ("bandwidth burst", rates.bandwidth_burst_bytes.map(bytes)),
        ("weight", settings.weight.map(|w| w.to_string())),
        ("cache reserved", settings.cache_reserve_bytes.map(bytes)),
        ("cache at most", settings.cache_bytes_max.map(bytes)),
        ("dirty at most", settings.dirty_bytes_max.map(bytes)),
        ("key", settings.key.clone()),
        ("requests", info.requests.as_ref().map(requests)),
        ("traffic", info.requests.as_ref().map(traffic)),
        (
            "cost",
            info.requests
                .filter(|r| r.cost > 0.0)
                .map(|r| format!("{:.4} since the daemon started", r.cost)),
        ),
    ]
}

fn requests(of: &StoreRequests) -> String {
    let StoreRequests {
        puts,
        gets,
        lists,
        deletes,
        ..
    } = of;
    format!("{puts} puts, {gets} gets, {lists} lists, {deletes} deletes")
}

fn traffic(of: &StoreRequests) -> String {
    let (sent, received) = (bytes(of.written_bytes), bytes(of.read_bytes));
    format!("{sent} sent, {received} received")
}
