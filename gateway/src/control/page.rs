//! Lists by pages.
//!
//! **Invariant:** a list is gone through in the order of its items' places, and a page goes on behind a place
//! whether what was there still is: so what is there all the time is on exactly one page.

use quarry_objfmt::TenantName;
use schemars::JsonSchema;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::api::{Query, query};
use super::openapi::Name;
use super::{ApiError, ApiResult};

/// Items of a page at most, and where no limit is given.
pub const PAGE_MAX: u32 = 1000;

/// Query: a page of a list.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PageQuery {
    /// How many at most: 1 to 1000.
    #[schemars(range(min = 1, max = 1000))]
    pub limit: Option<u32>,
    /// What `next` said on the page before.
    pub after: Option<String>,
}

/// Query: a page of a list, of one tenant if one is named.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TenantPageQuery {
    /// Only this tenant's.
    #[schemars(with = "Option<Name>")]
    tenant: Option<String>,
    /// How many at most: 1 to 1000.
    #[schemars(range(min = 1, max = 1000))]
    limit: Option<u32>,
    /// What `next` said on the page before.
    after: Option<String>,
}

/// A page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Page {
    /// Items at most.
    pub limit: usize,
    /// The place behind which it begins; none: the first page.
    pub after: Option<String>,
}

impl Page {
    /// Everything at once, for callers within the program.
    #[cfg(test)]
    pub const ALL: Self = Self {
        limit: usize::MAX,
        after: None,
    };

    fn new(limit: Option<u32>, after: Option<String>) -> ApiResult<Self> {
        if limit == Some(0) {
            let remedy = format!("ask for 1 to {PAGE_MAX}");
            return Err(ApiError::invalid("a page of no items has no end", remedy));
        }
        let limit = limit.unwrap_or(PAGE_MAX).min(PAGE_MAX);
        Ok(Self {
            limit: limit as usize,
            after,
        })
    }

    /// The page of `all`, whose places `place` tells, and where the next one begins.
    pub fn cut<T>(
        &self,
        mut all: Vec<T>,
        place: impl Fn(&T) -> String,
    ) -> (Vec<T>, Option<String>) {
        all.sort_by_cached_key(&place);
        if let Some(after) = &self.after {
            let behind = all.partition_point(|item| place(item) <= *after);
            all.drain(..behind);
        }
        let more = all.len() > self.limit;
        all.truncate(self.limit);
        let next = all.last().filter(|_| more).map(place);
        (all, next)
    }
}

/// The page that is asked for.
pub(super) fn page(asked: Query<PageQuery>) -> ApiResult<Page> {
    let PageQuery { limit, after } = query(asked, "use ?limit=NUMBER and ?after=NEXT, or none")?;
    Page::new(limit, after)
}

/// The page that is asked for, and whose items.
pub(super) fn tenant_page(asked: Query<TenantPageQuery>) -> ApiResult<(Option<TenantName>, Page)> {
    let remedy = "use ?tenant=NAME, ?limit=NUMBER and ?after=NEXT, or none";
    let asked = query(asked, remedy)?;
    let tenant = asked.tenant.map(TenantName::new).transpose()?;
    Ok((tenant, Page::new(asked.limit, asked.after)?))
}

/// A part of a list that may have more.
pub(super) trait Listed: DeserializeOwned {
    /// Where the next page begins, if there is one; it is not kept.
    fn next(&mut self) -> Option<String>;
    /// Takes the items of the page behind it.
    fn append(&mut self, page: Self);
}

/// Makes a list of its items.
macro_rules! listed {
    ($list:ty, $items:ident) => {
        impl super::page::Listed for $list {
            fn next(&mut self) -> Option<String> {
                self.next.take()
            }

            fn append(&mut self, mut page: Self) {
                self.$items.append(&mut page.$items);
                self.next = page.next;
            }
        }
    };
}
pub(super) use listed;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_each_item_once_though_others_come_and_go() {
        let place = |n: &u32| format!("{n:04}");
        let mut page = Page::new(Some(3), None).unwrap();
        let mut there: Vec<u32> = (0..20).rev().collect();
        let mut seen = Vec::new();
        loop {
            let (items, next) = page.cut(there.clone(), place);
            assert!(items.len() <= 3);
            seen.extend(items);
            let Some(next) = next else { break };
            // The last of the page goes, and something comes in front of it.
            there.retain(|n| Some(n) != seen.last());
            there.push(0);
            page.after = Some(next);
        }
        assert_eq!(seen, (0..20).collect::<Vec<_>>());
    }

    #[test]
    fn page_of_nothing_is_refused_and_a_large_one_cut() {
        assert!(Page::new(Some(0), None).is_err());
        assert_eq!(
            Page::new(Some(u32::MAX), None).unwrap().limit,
            PAGE_MAX as usize
        );
        let (items, next) = Page::ALL.cut(vec![1, 2], |n| n.to_string());
        assert_eq!((items.len(), next), (2, None));
    }
}
